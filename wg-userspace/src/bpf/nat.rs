//! The programs of NAT: at a TUN device's ingress and at NICs' ingress, with their maps. Each device with a
//! `Nat`, `Forward` or `Allow` line has them of its own. What they do stands in [`wg_common::nat`].

mod clsact;
mod pages;
mod tables;

use std::collections::HashMap as StdHashMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use aya::maps::lpm_trie::Key;
use aya::maps::{Array, ArrayOfMaps, HashMap, LpmTrie, MapData, PerCpuArray};
use aya::programs::links::LinkOrder;
use aya::programs::tc::{SchedClassifierLink, TcAttachOptions, TcAttachType};
use aya::programs::{ProgramError, SchedClassifier, TestRun as _, TestRunOptions};
use aya::{Ebpf, EbpfLoader};
use wg_common::map::{LOG_GLOBAL, OWNERS_LEN, OWNERS_V4, OWNERS_V6};
use wg_common::nat::map::{
    ALLOW_COUNTERS, ALLOW_RULES_LEN, ANSWERED, ANSWERED_LEN, EXTERNALS_LEN, FLOWS, FLOWS_LEN,
    FRAGMENTS, FRAGMENTS_LEN, FREE_PORTS, Flow, FlowKey, LINK_LEN_GLOBAL, MAPPINGS, MAPPINGS_LEN,
    Mapping, MappingKey, NAT_COUNTERS, NIC_PROGRAM, OWNER, OWNER_BY_LINK, PORT_RINGS, PORTS_LEN,
    PROTOCOLS_LEN, RING_TAIL, RING_WORDS, RULES, RuleSet, SLOTS, SLOTS_PER_EXTERNAL, Slot,
    TUN_PROGRAM, slot_index,
};
use wg_common::outcome::{DropReason, NAT_COUNTER_COUNT, NatEvent};

pub use self::clsact::remove_left_overs;
pub use self::pages::{FlowPages, MappingPages, NatIds, NatView};
pub use self::tables::NatTables;
use super::error::NatAttachError;
use super::{BpfError, NOT_OF_NAT, OBJECT, absent_is_fine, take, words};
use crate::sys::{SharedWords, link};

/// What can be chosen when the programs are loaded.
#[derive(Clone, Copy, Debug)]
pub struct NatOptions {
    /// Most flows at a time.
    pub flows: u32,
    /// Most mappings at a time.
    pub mappings: u32,
    /// External addresses for which there are slots, 3 MiB and as much again for the rings of each; at most
    /// [`EXTERNALS_LEN`]. An address beyond them has no ports.
    pub externals: u32,
    /// Whether the programs write log lines, for `Nat::log_reader`.
    pub log: bool,
}

impl Default for NatOptions {
    fn default() -> Self {
        Self { flows: FLOWS_LEN, mappings: MAPPINGS_LEN, externals: 1, log: false }
    }
}

/// One of the two programs.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum NatHook {
    /// At the TUN device's ingress.
    Tun,
    /// At a NIC's ingress.
    Nic,
}

impl NatHook {
    const fn program(self) -> &'static str {
        match self {
            Self::Tun => TUN_PROGRAM,
            Self::Nic => NIC_PROGRAM,
        }
    }
}

/// How a program is attached.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Attachment {
    /// By a link, first in the chain: it ends with this process.
    Tcx,
    /// As a filter of the clsact qdisc, on kernels before 6.6: it outlives a process that is killed. When
    /// [`Nat::say_alive`] was not called for [`OWNER_STALE_NS`](wg_common::nat::map::OWNER_STALE_NS), and the TUN device
    /// is gone, it lets everything pass, until [`remove_left_overs`] removes it.
    Clsact,
}

/// What keeps a program where it is.
enum Kept {
    Link(#[expect(dead_code, reason = "kept for its end")] SchedClassifierLink),
    Filter(clsact::Attached),
}

impl Kept {
    fn attachment(&self) -> Attachment {
        match self {
            Self::Link(_) => Attachment::Tcx,
            Self::Filter(_) => Attachment::Clsact,
        }
    }

    fn is_there(&self) -> bool {
        match self {
            // Nobody else can end it.
            Self::Link(_) => true,
            Self::Filter(filter) => filter.is_there(),
        }
    }
}

/// The programs of NAT in the kernel, with their maps. Dropping it detaches them everywhere.
pub struct Nat {
    /// Interface index and hook → what keeps the program there.
    attached: StdHashMap<(u32, NatHook), Kept>,
    rules: ArrayOfMaps<MapData, Array<MapData, RuleSet>>,
    flows: HashMap<MapData, FlowKey, Flow>,
    mappings: HashMap<MapData, MappingKey, Mapping>,
    slots: Array<MapData, Slot>,
    free_ports: Arc<SharedWords>,
    port_rings: Arc<SharedWords>,
    owner: Arc<SharedWords>,
    owners_v4: LpmTrie<MapData, [u8; 4], u32>,
    owners_v6: LpmTrie<MapData, [u8; 16], u32>,
    counters: PerCpuArray<MapData, u64>,
    allow_counters: PerCpuArray<MapData, u64>,
    early_ids: pages::EarlyIds,
    ebpf: Ebpf,
}

impl Nat {
    /// Loads the programs and makes their maps. No rule holds yet, nobody owns anything, no port is free, and
    /// nothing is attached.
    ///
    /// # Errors
    /// As those of [`Steer::load`](super::Steer::load).
    pub fn load(options: NatOptions) -> Result<Self, BpfError> {
        Self::load_with(options, 0)
    }

    /// As [`Nat::load`], with this many bytes before the IP header at the TUN device.
    fn load_with(options: NatOptions, link_len: u32) -> Result<Self, BpfError> {
        let externals = options.externals.clamp(1, EXTERNALS_LEN as u32);
        let rings = externals * PROTOCOLS_LEN;
        let log = u8::from(options.log);
        let mut loader = EbpfLoader::new();
        for map in NOT_OF_NAT {
            loader.map_max_entries(map, 1);
        }
        let mut ebpf = loader
            .override_global(LOG_GLOBAL, &log, true)
            .override_global(LINK_LEN_GLOBAL, &link_len, true)
            .map_max_entries(FLOWS, options.flows.max(1))
            .map_max_entries(MAPPINGS, options.mappings.max(1))
            .map_max_entries(SLOTS, externals * SLOTS_PER_EXTERNAL)
            .map_max_entries(FREE_PORTS, rings * PORTS_LEN)
            .map_max_entries(PORT_RINGS, rings * RING_WORDS)
            .map_max_entries(FRAGMENTS, FRAGMENTS_LEN)
            .map_max_entries(ANSWERED, ANSWERED_LEN)
            .map_max_entries(ALLOW_COUNTERS, ALLOW_RULES_LEN as u32)
            .map_max_entries(OWNERS_V4, OWNERS_LEN)
            .map_max_entries(OWNERS_V6, OWNERS_LEN)
            .load(OBJECT)
            .map_err(BpfError::object)?;
        for hook in [NatHook::Tun, NatHook::Nic] {
            let name = hook.program();
            program(&mut ebpf, hook)?.load().map_err(|error| BpfError::program(name, error))?;
        }
        let counters: PerCpuArray<MapData, u64> = take(&mut ebpf, NAT_COUNTERS)?;
        if counters.len() as usize != NAT_COUNTER_COUNT {
            return Err(BpfError::Stale(NAT_COUNTERS));
        }
        let rules = ebpf.take_map(RULES).ok_or(BpfError::Missing(RULES))?;
        let (free_ports, port_rings) =
            (words(&mut ebpf, FREE_PORTS)?, words(&mut ebpf, PORT_RINGS)?);
        let early_ids = pages::EarlyIds::of(&rules, &free_ports.fd, &port_rings.fd)?;
        let nat = Self {
            attached: StdHashMap::new(),
            rules: rules.try_into().map_err(|error| BpfError::map(RULES, error))?,
            flows: take(&mut ebpf, FLOWS)?,
            mappings: take(&mut ebpf, MAPPINGS)?,
            slots: take(&mut ebpf, SLOTS)?,
            free_ports: free_ports.words,
            port_rings: port_rings.words,
            owner: words(&mut ebpf, OWNER)?.words,
            owners_v4: take(&mut ebpf, OWNERS_V4)?,
            owners_v6: take(&mut ebpf, OWNERS_V6)?,
            counters,
            allow_counters: take(&mut ebpf, ALLOW_COUNTERS)?,
            early_ids,
            ebpf,
        };
        nat.owner[0].store(OWNER_BY_LINK, Ordering::Relaxed);
        Ok(nat.without_others_maps())
    }

    /// Each descriptor counts.
    fn without_others_maps(mut self) -> Self {
        let names: Vec<String> = self.ebpf.maps().map(|(name, _)| name.to_owned()).collect();
        for name in names {
            drop(self.ebpf.take_map(&name));
        }
        self
    }

    /// Attaches a program to an interface, first of those that are there, for the TUN device with the index `tun`; does
    /// nothing where it is attached. Programs of others stay, and get what is none of ours.
    ///
    /// # Errors
    /// Why it is not attached; everything is as before then.
    pub fn attach(
        &mut self,
        interface: &str,
        hook: NatHook,
        tun: u32,
    ) -> Result<Attachment, NatAttachError> {
        let unknown = || NatAttachError::UnknownInterface(interface.to_owned());
        let ifindex = link::index(interface).map_err(|_| unknown())?;
        if hook == NatHook::Nic && !link::has_ethernet_header(interface).map_err(|_| unknown())? {
            return Err(NatAttachError::NoEthernetHeader(interface.to_owned()));
        }
        match self.attached.get(&(ifindex, hook)) {
            Some(kept) if kept.is_there() => return Ok(kept.attachment()),
            // Its qdisc is not touched: it is another one by now.
            Some(_) => drop(self.attached.remove(&(ifindex, hook))),
            None => {}
        }
        let program = program(&mut self.ebpf, hook)?;
        let link = if has_links() { Some(attach_link(program, interface)) } else { None };
        let kept = match link {
            Some(Ok(link)) => Kept::Link(link),
            Some(Err(error)) if !NatAttachError::is_unknown_link(&error) => {
                return Err(NatAttachError::new(interface, error));
            }
            _ => {
                let filter = clsact::Attached::new(program, interface, ifindex, tun)?;
                // From now on somebody must say that he lives.
                let (by_link, relaxed) = (OWNER_BY_LINK, Ordering::Relaxed);
                let _ = self.owner[0].compare_exchange(by_link, 0, relaxed, relaxed);
                Kept::Filter(filter)
            }
        };
        let attachment = kept.attachment();
        self.attached.insert((ifindex, hook), kept);
        Ok(attachment)
    }

    /// Takes the programs away from the interface with this index, whether it is there or gone.
    pub fn detach_index(&mut self, ifindex: u32) {
        self.attached.retain(|(at, _), _| *at != ifindex);
    }

    /// Where programs are attached, by interface index.
    pub fn attached(&self) -> impl Iterator<Item = (u32, NatHook, Attachment)> + '_ {
        self.attached.iter().map(|((ifindex, hook), kept)| (*ifindex, *hook, kept.attachment()))
    }

    /// Says that the owner lives, at a boot time in nanoseconds; wanted once a second where a program is
    /// attached as [`Attachment::Clsact`], and of no effect elsewhere.
    pub fn say_alive(&self, now_ns: u64) {
        if self.attached.values().any(|kept| kept.attachment() == Attachment::Clsact) {
            self.owner[0].store(now_ns, Ordering::Relaxed);
        }
    }

    /// Puts a set of rules in the place of the present one, as a whole: no packet sees parts of both. When this
    /// returns, no program uses the former one.
    ///
    /// # Errors
    /// If the kernel refuses; then the present set holds on.
    pub fn swap_rules(&mut self, rules: &RuleSet) -> Result<(), BpfError> {
        let refused = |error| BpfError::map(RULES, error);
        let mut inner: Array<MapData, RuleSet> = Array::create(1, 0).map_err(refused)?;
        inner.set(0, rules, 0).map_err(refused)?;
        // The kernel waits here until programs that found the former set are done.
        self.rules.set(0, &inner, 0).map_err(refused)
    }

    /// Says that some peer owns this very prefix, or that nobody does; host bits are ignored.
    ///
    /// # Errors
    /// [`BpfError::Full`] if there are too many prefixes: packets from this one are dropped.
    ///
    /// # Panics
    /// If `len` is beyond the address's bits.
    pub fn set_owned(&mut self, addr: IpAddr, len: u8, owned: bool) -> Result<(), BpfError> {
        fn set<const N: usize>(
            owners: &mut LpmTrie<MapData, [u8; N], u32>,
            prefix: &Key<[u8; N]>,
            owned: bool,
        ) -> Result<(), aya::maps::MapError>
        where
            [u8; N]: aya::Pod,
        {
            if owned { owners.insert(prefix, 0, 0) } else { absent_is_fine(owners.remove(prefix)) }
        }
        let (name, outcome) = match addr {
            IpAddr::V4(addr) => {
                assert!(u32::from(len) <= u32::BITS, "a prefix of IPv4");
                (OWNERS_V4, set(&mut self.owners_v4, &Key::new(len.into(), addr.octets()), owned))
            }
            IpAddr::V6(addr) => {
                assert!(u32::from(len) <= u128::BITS, "a prefix of IPv6");
                (OWNERS_V6, set(&mut self.owners_v6, &Key::new(len.into(), addr.octets()), owned))
            }
        };
        outcome.map_err(|error| BpfError::map(name, error))
    }

    /// How many external addresses have slots.
    pub fn external_count(&self) -> u32 {
        self.slots.len() / SLOTS_PER_EXTERNAL
    }

    /// How many ports a ring has free.
    ///
    /// # Panics
    /// If there is no such ring.
    pub fn free_port_count(&self, ring: u32) -> u32 {
        let [head, tail] = self.ring(ring);
        tail.load(Ordering::Relaxed).wrapping_sub(head.load(Ordering::Relaxed)) as u32
    }

    /// Puts a port, counted from [`RuleSet::port_first`], at the end of a ring; says whether there was room for it.
    /// The caller sees to it that it is in no ring yet, and that its slot's generation is even.
    ///
    /// # Panics
    /// If there is no such ring, or port.
    pub fn free_port(&self, ring: u32, port: u32) -> bool {
        assert!(port < PORTS_LEN, "a port of a ring");
        let [head, tail] = self.ring(ring);
        let at = tail.load(Ordering::Relaxed);
        if at.wrapping_sub(head.load(Ordering::Acquire)) >= u64::from(PORTS_LEN) {
            return false;
        }
        let word = slot_index(ring, at as u32 % PORTS_LEN) as usize;
        self.free_ports[word].store(port.into(), Ordering::Relaxed);
        tail.store(at + 1, Ordering::Release);
        true
    }

    /// Takes all ports out of a ring that no program has taken yet; says how many there were. For a range of ports
    /// that changes.
    ///
    /// # Panics
    /// If there is no such ring.
    pub fn clear_ring(&self, ring: u32) -> u32 {
        let [head, tail] = self.ring(ring);
        let end = tail.load(Ordering::Relaxed);
        end.wrapping_sub(head.swap(end, Ordering::AcqRel)) as u32
    }

    fn ring(&self, ring: u32) -> [&std::sync::atomic::AtomicU64; 2] {
        let first = (ring * RING_WORDS) as usize;
        [&self.port_rings[first], &self.port_rings[first + RING_TAIL as usize]]
    }

    /// What stands in a slot.
    ///
    /// # Errors
    /// If there is no such slot, or the kernel refuses.
    pub fn slot(&self, index: u32) -> Result<Slot, BpfError> {
        self.slots.get(&index, 0).map_err(|error| BpfError::map(SLOTS, error))
    }

    /// Takes a slot back from who has it: its generation becomes even, and flows and mappings of it are over. Its
    /// port may go into its ring then ([`Nat::free_port`]). Does nothing to a slot that nobody has.
    ///
    /// # Errors
    /// As [`Nat::slot`].
    pub fn end_slot(&mut self, index: u32) -> Result<(), BpfError> {
        let slot = self.slot(index)?;
        if slot.generation % 2 == 0 {
            return Ok(());
        }
        let ended = Slot { generation: slot.generation.wrapping_add(1), ..slot };
        self.slots.set(index, ended, 0).map_err(|error| BpfError::map(SLOTS, error))
    }

    /// Ends a flow; one that is not there is no error.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn remove_flow(&mut self, key: &FlowKey) -> Result<(), BpfError> {
        absent_is_fine(self.flows.remove(key)).map_err(|error| BpfError::map(FLOWS, error))
    }

    /// Ends a mapping; one that is not there is no error.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn remove_mapping(&mut self, key: &MappingKey) -> Result<(), BpfError> {
        absent_is_fine(self.mappings.remove(key)).map_err(|error| BpfError::map(MAPPINGS, error))
    }

    /// What the programs counted since they were loaded, summed over all CPUs.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn counters(&self) -> Result<NatCounters, BpfError> {
        NatCounters::of(&self.counters)
    }

    /// How many flows began by an [`AllowRule`](wg_common::nat::map::AllowRule) with this counter.
    ///
    /// # Errors
    /// If there is no such counter, or the kernel refuses.
    pub fn allowed(&self, counter: u32) -> Result<u64, BpfError> {
        sum_of(&self.allow_counters, ALLOW_COUNTERS, counter)
    }
}

fn sum_of(
    counters: &PerCpuArray<MapData, u64>,
    name: &'static str,
    counter: u32,
) -> Result<u64, BpfError> {
    let per_cpu = counters.get(&counter, 0).map_err(|error| BpfError::map(name, error))?;
    Ok(per_cpu.iter().sum())
}

fn program(ebpf: &mut Ebpf, hook: NatHook) -> Result<&mut SchedClassifier, BpfError> {
    let name = hook.program();
    let program = ebpf.program_mut(name).ok_or(BpfError::Missing(name))?;
    program.try_into().map_err(|error| BpfError::program(name, error))
}

fn attach_link(
    program: &mut SchedClassifier,
    interface: &str,
) -> Result<SchedClassifierLink, ProgramError> {
    let order = TcAttachOptions::TcxOrder(LinkOrder::first());
    let id = program.attach_with_options(interface, TcAttachType::Ingress, order)?;
    program.take_link(id)
}

/// Whether to try links. A hook for tests: `TIDEGATE_TEST_CLSACT=1` does without, as with a kernel that has none.
fn has_links() -> bool {
    !(cfg!(debug_assertions) && std::env::var("TIDEGATE_TEST_CLSACT").is_ok_and(|it| it == "1"))
}

/// What the programs counted.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct NatCounters([u64; NAT_COUNTER_COUNT]);

impl NatCounters {
    fn of(map: &PerCpuArray<MapData, u64>) -> Result<Self, BpfError> {
        let mut counters = Self::default();
        for (counter, sum) in (0..).zip(&mut counters.0) {
            *sum = sum_of(map, NAT_COUNTERS, counter)?;
        }
        Ok(counters)
    }

    /// Packets dropped for this reason. A super-packet is one.
    pub fn dropped(&self, reason: DropReason) -> u64 {
        self.0[reason as usize]
    }

    /// Packets to which this happened. A super-packet is one.
    pub fn event(&self, event: NatEvent) -> u64 {
        self.0[DropReason::COUNT + event as usize]
    }

    /// All reasons with their counts.
    pub fn drops(&self) -> impl Iterator<Item = (DropReason, u64)> + '_ {
        DropReason::ALL.iter().map(|reason| (*reason, self.dropped(*reason)))
    }

    /// All events with their counts.
    pub fn events(&self) -> impl Iterator<Item = (NatEvent, u64)> + '_ {
        NatEvent::ALL.iter().map(|event| (*event, self.event(*event)))
    }
}

impl Default for NatCounters {
    fn default() -> Self {
        Self([0; NAT_COUNTER_COUNT])
    }
}

/// What a program tells the kernel to do with a packet.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum NatVerdict {
    /// The next program gets it, or the kernel's stack.
    Next,
    /// Dropped.
    Drop,
    /// Goes where the program said.
    Redirect,
    /// Another of the kernel's verdicts, which no program gives.
    Other(i32),
}

impl NatVerdict {
    fn from_value(value: u32) -> Self {
        match value as i32 {
            -1 => Self::Next,
            2 => Self::Drop,
            7 => Self::Redirect,
            other => Self::Other(other),
        }
    }
}

/// A run of a program on a packet, without an interface.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct NatRun {
    /// What it said.
    pub verdict: NatVerdict,
    /// What it made of the frame.
    pub frame: Vec<u8>,
    /// Mean time of a run.
    pub mean: Duration,
}

impl Nat {
    /// As [`Nat::load`], with programs that get whole frames at the TUN device's hook too, as the kernel gives them
    /// to [`Nat::test_run`].
    ///
    /// # Errors
    /// As those of [`Nat::load`].
    pub fn load_for_runs(options: NatOptions) -> Result<Self, BpfError> {
        Self::load_with(options, wg_common::headers::ETHERNET_LEN as u32)
    }

    /// Runs a program on an Ethernet frame, as if it had come on the interface with this index of the calling
    /// thread's network namespace; `gso_size` as the kernel gives it of a super-packet, else 0. Nothing is
    /// delivered. Of `repeat` runs each gets what the one before made of the frame.
    ///
    /// # Errors
    /// If the kernel refuses the frame: it has less than an Ethernet header, or more than a page.
    pub fn test_run(
        &self,
        hook: NatHook,
        ifindex: u32,
        frame: &[u8],
        gso_size: u32,
        repeat: u32,
    ) -> Result<NatRun, BpfError> {
        // Where these stand in the kernel's `struct __sk_buff`, in words.
        const IFINDEX: usize = 10;
        const GSO_SEGS: usize = 41;
        const GSO_SIZE: usize = 44;

        let name = hook.program();
        let refused = |error| BpfError::program(name, error);
        let program = self.ebpf.program(name).ok_or(BpfError::Missing(name))?;
        let program: &SchedClassifier = program.try_into().map_err(refused)?;
        let mut words = [0u32; 48];
        words[IFINDEX] = ifindex;
        words[GSO_SIZE] = gso_size;
        if gso_size != 0 {
            words[GSO_SEGS] = (frame.len() as u32).div_ceil(gso_size);
        }
        let context: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        let mut out = vec![0; frame.len() + 128];
        let mut options = TestRunOptions::new();
        options.data_in = Some(frame);
        options.data_out = Some(&mut out);
        options.ctx_in = Some(&context);
        options.repeat = repeat;
        let result = program.test_run(options).map_err(refused)?;
        let len = result.data_size_out as usize;
        out.truncate(len);
        Ok(NatRun {
            verdict: NatVerdict::from_value(result.return_value),
            frame: out,
            mean: result.duration,
        })
    }
}
