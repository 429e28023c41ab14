//! The maps of [`wg_common::nat::map`].
#![expect(unsafe_code, reason = "map values are shared with the user side and other CPUs")]

use aya_ebpf::EbpfContext as _;
use aya_ebpf::bindings::bpf_map_type::BPF_MAP_TYPE_ARRAY;
use aya_ebpf::bindings::{BPF_F_MMAPABLE, BPF_F_NO_PREALLOC, bpf_fib_lookup};
use aya_ebpf::btf_maps;
use aya_ebpf::helpers::{bpf_check_mtu, bpf_ktime_get_boot_ns, bpf_map_lookup_elem};
use aya_ebpf::macros::{btf_map, map};
use aya_ebpf::maps::{Array, HashMap, LruHashMap, PerCpuArray};
use aya_ebpf::programs::TcContext;
use wg_common::map::AddressKey;
use wg_common::nat::engine::Work;
use wg_common::nat::limit::{Bucket, KINDS, receiver};
use wg_common::nat::map::{
    Flow, FlowKey, FragmentEntry, FragmentKey, Mapping, MappingKey, OWNER_STALE_NS, PORTS_LEN,
    RING_TAIL, RING_WORDS, RuleSet, Slot, slot_index,
};
use wg_common::outcome::{DropReason, NAT_COUNTER_COUNT, NatEvent};

// What the loader sizes has one entry here: each device's programs bring all maps of the object, and do with most
// of them nothing.

/// An array with one set of rules, as the loader reads it. By sizes and not by types: some kernels (6.1, for one) put a map
/// without types, as control makes them, only where the first one had none.
#[repr(C)]
struct RulesArray {
    r#type: *const [i32; BPF_MAP_TYPE_ARRAY as usize],
    key_size: *const [i32; size_of::<u32>()],
    value_size: *const [i32; size_of::<RuleSet>()],
    max_entries: *const [i32; 1],
}

#[btf_map]
static NAT_RULES: btf_maps::ArrayOfMaps<RulesArray, 1> = btf_maps::ArrayOfMaps::new();

#[map]
static NAT_FLOWS: HashMap<FlowKey, Flow> = HashMap::with_max_entries(1, BPF_F_NO_PREALLOC);

#[map]
static NAT_MAPPINGS: HashMap<MappingKey, Mapping> = HashMap::with_max_entries(1, BPF_F_NO_PREALLOC);

#[map]
static NAT_SLOTS: Array<Slot> = Array::with_max_entries(1, BPF_F_MMAPABLE);

#[map]
static NAT_FREE_PORTS: Array<u64> = Array::with_max_entries(1, BPF_F_MMAPABLE);

#[map]
static NAT_PORT_RINGS: Array<u64> = Array::with_max_entries(1, BPF_F_MMAPABLE);

#[map]
static NAT_FRAGMENTS: LruHashMap<FragmentKey, FragmentEntry> = LruHashMap::with_max_entries(1, 0);

#[map]
static NAT_ANSWERS: Array<u64> = Array::with_max_entries(KINDS as u32, 0);

#[map]
static NAT_ANSWERED: LruHashMap<AddressKey, [u64; KINDS]> = LruHashMap::with_max_entries(1, 0);

#[map]
static NAT_COUNTERS: PerCpuArray<u64> = PerCpuArray::with_max_entries(NAT_COUNTER_COUNT as u32, 0);

#[map]
static NAT_ALLOWED: PerCpuArray<u64> = PerCpuArray::with_max_entries(1, 0);

#[map]
static NAT_OWNER: Array<u64> = Array::with_max_entries(1, BPF_F_MMAPABLE);

/// What a program needs for a packet and has no room for on its stack. Of each CPU: no packet is judged while
/// another one is.
#[repr(C)]
pub struct Scratch {
    /// The engine's.
    pub work: Work,
    /// What the kernel is asked of the way, and says.
    pub fib: bpf_fib_lookup,
    /// The rule that was looked for.
    pub rule: u32,
}

#[map]
static NAT_SCRATCH: PerCpuArray<Scratch> = PerCpuArray::with_max_entries(1, 0);

/// This CPU's scratch memory.
#[inline(always)]
pub fn scratch() -> Option<&'static mut Scratch> {
    let scratch = NAT_SCRATCH.get_ptr_mut(0)?;
    // SAFETY: this CPU's own, which a run of a program asks for once. It holds integers, and enums of which only the
    // engine writes values; the zeros with which it begins are values of all.
    Some(unsafe { &mut *scratch })
}

/// Bytes that the kernel sums up at a time: no more than it did before 6.13.
pub const SUMMED_LEN: usize = 512;

#[map]
static NAT_SUMMED: PerCpuArray<[u8; SUMMED_LEN]> = PerCpuArray::with_max_entries(1, 0);

/// This CPU's memory for bytes of a packet that are summed up.
#[inline(always)]
pub fn summed() -> Option<&'static mut [u8; SUMMED_LEN]> {
    let summed = NAT_SUMMED.get_ptr_mut(0)?;
    // SAFETY: this CPU's own, which nobody else asks for while it is used.
    Some(unsafe { &mut *summed })
}

/// What holds now: nothing where no rules were set, or where their owner is dead. Control puts another set in
/// the place of this one, and never changes it.
///
/// An owner that is silent and has no TUN device any more is dead. One that only stands still has left rules
/// that say what is not to pass.
#[inline(always)]
pub fn rules(context: &TcContext) -> Option<&'static RuleSet> {
    let owner = NAT_OWNER.get_ptr(0)?;
    // SAFETY: the word outlives the program, and is written in one piece.
    let alive_ns = unsafe { owner.read_volatile() };
    let array = core::ptr::from_ref(NAT_RULES.get(0)?).cast_mut();
    // SAFETY: the kernel reads a key of four bytes, as the array has them, and gives null or its one element, which is a
    // whole set of rules and stays until this run of the program is over.
    let rules = unsafe {
        let key = 0u32;
        bpf_map_lookup_elem(array.cast(), (&raw const key).cast()).cast::<RuleSet>().as_ref()
    }?;
    let is_silent = now_ns().saturating_sub(alive_ns) > OWNER_STALE_NS;
    (!is_silent || is_there(context, rules.tun)).then_some(rules)
}

/// Whether there is a device with this index where the packet is.
#[inline(always)]
fn is_there(context: &TcContext, ifindex: u32) -> bool {
    const ENODEV: i64 = 19;
    let mut mtu = 0;
    // SAFETY: the kernel reads and writes one word.
    let result = unsafe { bpf_check_mtu(context.as_ptr(), ifindex, &mut mtu, 0, 0) };
    result != -ENODEV
}

/// Boot time in nanoseconds.
#[inline(always)]
pub fn now_ns() -> u64 {
    // SAFETY: the helper has no preconditions.
    unsafe { bpf_ktime_get_boot_ns() }
}

/// A flow's entry, or null.
#[inline(always)]
pub fn flow(key: &FlowKey) -> *mut Flow {
    // Not an option, which a program's stack would hold as two words: the verifier knows that one is a pointer.
    NAT_FLOWS.get_ptr_mut(key).unwrap_or(core::ptr::null_mut())
}

/// Makes a flow's entry, or replaces it; `false` if there is no room.
#[inline(always)]
pub fn put_flow(key: &FlowKey, flow: &Flow) -> bool {
    NAT_FLOWS.insert(key, flow, 0).is_ok()
}

/// Removes a flow's entry.
#[inline(always)]
pub fn remove_flow(key: &FlowKey) {
    // Control may have been faster.
    let _ = NAT_FLOWS.remove(key);
}

/// A mapping's entry.
#[inline(always)]
pub fn mapping(key: &MappingKey) -> Option<Mapping> {
    let entry = NAT_MAPPINGS.get_ptr(key)?;
    // SAFETY: the kernel keeps the memory of the element until this run of the program is over.
    Some(unsafe { entry.read_volatile() })
}

/// Makes a mapping's entry, or replaces it; `false` if there is no room.
#[inline(always)]
pub fn put_mapping(key: &MappingKey, mapping: &Mapping) -> bool {
    NAT_MAPPINGS.insert(key, mapping, 0).is_ok()
}

/// A slot.
#[inline(always)]
pub fn slot(index: u32) -> Option<*mut Slot> {
    NAT_SLOTS.get_ptr_mut(index)
}

/// What becomes of a packet's fragments.
#[inline(always)]
pub fn fragments(key: &FragmentKey) -> Option<FragmentEntry> {
    let entry = NAT_FRAGMENTS.get_ptr(key)?;
    // SAFETY: the kernel keeps the memory of the element until this run of the program is over. If the element
    // gets another key meanwhile, these fragments go astray, as with an identification that two packets share.
    Some(unsafe { entry.read() })
}

/// Says what becomes of a packet's fragments.
#[inline(always)]
pub fn put_fragments(key: &FragmentKey, entry: &FragmentEntry) {
    // Without an entry they are dropped.
    let _ = NAT_FRAGMENTS.insert(key, entry, 0);
}

/// Takes the tokens of an error of this kind to an address, if there are any.
#[inline(always)]
pub fn may_answer(to: &AddressKey, kind: u32) -> bool {
    let now_ns = now_ns();
    let to = receiver(to);
    let Some(all) = NAT_ANSWERS.get_ptr_mut(kind) else { return false };
    let Some(one) = NAT_ANSWERED.get_ptr_mut(&to) else {
        // Of two CPUs at once one forgets what the other took.
        return take_token(all, Bucket::ALL, now_ns) && begin_answers(&to, kind, now_ns);
    };
    let one = one.cast::<u64>();
    // SAFETY: the value has a word for each kind.
    let one = if kind == 0 { one } else { unsafe { one.add(1) } };
    // Its own first: who asks too often takes nothing from others.
    take_token(one, Bucket::ONE, now_ns) && take_token(all, Bucket::ALL, now_ns)
}

/// Makes an address's buckets, and takes a token of one.
#[inline(always)]
fn begin_answers(to: &AddressKey, kind: u32, now_ns: u64) -> bool {
    let word = Bucket::ONE.take(0, now_ns).unwrap_or(0);
    let words = if kind == 0 { [word, 0] } else { [0, word] };
    // Without an entry the bucket of all counts.
    let _ = NAT_ANSWERED.insert(to, words, 0);
    true
}

/// Takes a token from a bucket, if it has one.
#[inline(always)]
fn take_token(word: *mut u64, bucket: Bucket, now_ns: u64) -> bool {
    const TRIES: usize = 4;

    for _ in 0..TRIES {
        // SAFETY: a word of an array, or of an element that the kernel keeps until this run of the program is over;
        // aligned, and others write it in one piece.
        let found = unsafe { word.read_volatile() };
        let Some(next) = bucket.take(found, now_ns) else { return false };
        // SAFETY: as above.
        if unsafe { compare_exchange(word, found, next) } == found {
            return true;
        }
    }
    false
}

/// Whether some peer owns an address.
#[inline(always)]
pub fn is_owned(address: &AddressKey) -> bool {
    crate::maps::owns(address)
}

/// Counts a dropped packet.
#[inline(always)]
pub fn count_drop(reason: DropReason) {
    count(&NAT_COUNTERS, reason as u32);
}

/// Counts what else became of a packet.
#[inline(always)]
pub fn count_event(event: NatEvent) {
    count(&NAT_COUNTERS, DropReason::COUNT as u32 + event as u32);
}

/// Counts a flow that was allowed.
#[inline(always)]
pub fn count_allowed(counter: u32) {
    count(&NAT_ALLOWED, counter);
}

#[inline(always)]
fn count(counters: &PerCpuArray<u64>, counter: u32) {
    if let Some(count) = counters.get_ptr_mut(counter) {
        // SAFETY: this CPU's own copy of the value; TC programs do not interrupt each other on a CPU, and the user
        // side only reads it.
        unsafe { *count += 1 };
    }
}

/// Takes a port from a ring, if it has one.
#[inline(always)]
pub fn take_port(ring: u32) -> Option<u32> {
    const TRIES: usize = 4;

    let head = NAT_PORT_RINGS.get_ptr_mut(ring * RING_WORDS)?;
    let tail = NAT_PORT_RINGS.get_ptr(ring * RING_WORDS + RING_TAIL)?;
    for _ in 0..TRIES {
        // SAFETY: words of arrays that outlive the program, aligned; others write them in one piece.
        let (at, end) = unsafe { (head.read_volatile(), tail.read_volatile()) };
        if at == end {
            return None;
        }
        let port = NAT_FREE_PORTS.get_ptr(slot_index(ring, at as u32 % PORTS_LEN))?;
        // SAFETY: as above.
        let port = unsafe { port.read_volatile() } as u32;
        // SAFETY: as above.
        if unsafe { compare_exchange(head, at, at + 1) } == at {
            return Some(port);
        }
    }
    None
}

/// Stores `new` where `old` stands; gives what stood there. Rust has no such operation for this target.
///
/// # Safety
/// `word` must be valid and aligned, and whoever else writes it does so atomically.
#[cfg(target_arch = "bpf")]
#[inline(always)]
unsafe fn compare_exchange(word: *mut u64, old: u64, new: u64) -> u64 {
    let found: u64;
    // SAFETY: the caller's word alone is written.
    unsafe {
        core::arch::asm!(
            "r0 = cmpxchg_64({word} + 0, r0, {new})",
            word = in(reg) word,
            new = in(reg) new,
            inout("r0") old => found,
        );
    }
    found
}

/// As above, where the crate is only checked.
///
/// # Safety
/// As above.
#[cfg(not(target_arch = "bpf"))]
unsafe fn compare_exchange(word: *mut u64, _old: u64, _new: u64) -> u64 {
    // SAFETY: the caller says so.
    unsafe { word.read() }
}
