//! How a NIC receives and sends: what is known of it in, what is chosen out, with the reason. Nothing here
//! asks anybody.
//!
//! First a [`Plan`] is made of what the host says, then of whether the steer program was attached; then each
//! queue is tried, and what came of that makes the [`Choice`].

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use crate::daemon::Mode;
use crate::host::XdpFeatures;
use crate::sys::ethtool::{IpKind, Rule, RuleTarget};
use crate::xsk::XskOptions;

/// Ethernet header and two VLAN tags.
const LINK_HEADER_LEN: usize = 14 + 2 * 4;
const CHUNK_SIZES: [u32; 2] = [2048, 4096];

/// What is known of a NIC.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Facts {
    /// Its name.
    pub name: String,
    /// Whether it is one end of a pair that the kernel makes.
    pub is_veth: bool,
    /// What its driver can do, if the kernel tells.
    pub features: Option<XdpFeatures>,
    /// Its MTU in bytes.
    pub mtu: u32,
    /// Its receive queues in use.
    pub queue_count: u32,
    /// The queues that get our ports' datagrams and nothing else.
    pub apart: Result<BTreeSet<u32>, NotApart>,
    /// Whether the steer program is attached, or why not; nothing if that was not tried.
    pub attached: Option<Result<(), String>>,
    /// Why sockets are to send in any case, if they are.
    pub by_socket: Option<String>,
    /// Whether threads are to ask it for packets, and why they cannot, if they cannot; nothing if nobody wants that.
    pub busy_poll: Option<Result<(), String>>,
}

/// Why no queues are set apart for our ports.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum NotApart {
    /// No device has been given its port yet.
    NoPort,
    /// There is one queue only.
    OneQueue,
    /// The driver does not tell what goes where.
    Unknown,
    /// No rule gives datagrams to this port a queue.
    NoRule {
        /// The port.
        port: u16,
    },
    /// Other packets come to such a queue, too.
    Shared {
        /// The port.
        port: u16,
        /// The queue.
        queue: u32,
    },
}

/// What is to be done with a NIC.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub enum Plan {
    /// The steer program is to be attached; then this is to be asked again.
    Attach,
    /// Sockets receive and send.
    Sockets {
        /// Why.
        reason: String,
    },
    /// What was asked for cannot be.
    Impossible {
        /// Why.
        reason: String,
    },
    /// XSKs receive.
    Xsk(XskPlan),
}

/// How XSKs are to be bound.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct XskPlan {
    /// Those to try zero-copy on, from 0; others copy.
    pub zero_copy: BTreeSet<u32>,
    /// Whether copying is no way out there.
    pub must: bool,
    /// Bytes of a chunk.
    pub chunk_size: u32,
    /// Why sockets are to send in any case, if they are.
    pub by_socket: Option<String>,
    /// As [`Facts::busy_poll`].
    pub busy_poll: Option<Result<(), String>>,
    /// Why it is so.
    pub reason: String,
}

/// What came of an XSK.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Bound {
    /// The driver uses its memory itself.
    ZeroCopy,
    /// The kernel copies.
    Copy,
    /// There is none.
    Refused(String),
}

/// How a NIC receives or sends.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum By {
    /// By XSKs whose memory the driver uses itself.
    ZeroCopy,
    /// By XSKs, to and from which the kernel copies.
    Copy,
    /// By sockets.
    Socket,
}

impl By {
    /// As reports have it.
    pub fn name(self) -> &'static str {
        match self {
            Self::ZeroCopy => "zero-copy",
            Self::Copy => "copy",
            Self::Socket => "socket",
        }
    }
}

/// What was chosen for a NIC.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Choice {
    /// How most of it receives.
    pub receive: By,
    /// How it sends.
    pub transmit: By,
    /// Why.
    pub reason: String,
}

/// What to do with a NIC of which this is known.
pub fn plan(asked: Mode, facts: &Facts) -> Plan {
    let sockets = |reason: &str| Plan::Sockets { reason: reason.to_owned() };
    let refused = |reason: String| match asked {
        Mode::ZeroCopy => Plan::Impossible { reason },
        _ => Plan::Sockets { reason },
    };
    match (asked, facts.features) {
        (Mode::Udp, _) => return sockets("asked for"),
        (Mode::Auto, _) if facts.is_veth => {
            return sockets("sockets are faster on a veth; `--mode native` uses XDP all the same");
        }
        (_, Some(features)) if !features.native => {
            let reason = "its driver has no native XDP; `--mode udp` does without";
            return refused(reason.to_owned());
        }
        (Mode::ZeroCopy, Some(features)) if !features.zero_copy => {
            let reason = "its driver has no zero-copy AF_XDP; `--mode native` copies";
            return refused(reason.to_owned());
        }
        _ => {}
    }
    match &facts.attached {
        None => Plan::Attach,
        Some(Err(reason)) => refused(reason.clone()),
        Some(Ok(())) => Plan::Xsk(xsk_plan(asked, facts)),
    }
}

fn xsk_plan(asked: Mode, facts: &Facts) -> XskPlan {
    let all = || (0..facts.queue_count).collect::<BTreeSet<u32>>();
    let can = facts.features.is_none_or(|features| features.zero_copy);
    let (zero_copy, mut reason) = match (asked, &facts.apart) {
        (Mode::Native, _) => (BTreeSet::new(), "native XDP, as asked for".to_owned()),
        (_, Ok(apart)) if can => (apart.clone(), format!("{} for our port alone", queues(apart))),
        (Mode::ZeroCopy, Err(why)) => {
            let warning = "zero-copy as asked for; the NIC's other traffic depends on this process";
            (all(), format!("{warning}: {}", why.with_advice(facts)))
        }
        _ if !can => (BTreeSet::new(), "its driver has no zero-copy AF_XDP".to_owned()),
        (_, Err(why)) => (BTreeSet::new(), format!("no zero-copy: {}", why.with_advice(facts))),
        (_, Ok(_)) => unreachable!("the driver can or cannot"),
    };
    let (chunk_size, takes) = chunk_for(facts.mtu);
    if facts.mtu as usize + LINK_HEADER_LEN > takes {
        reason +=
            &format!("; packets longer than {takes} bytes (MTU {}) pass to the socket", facts.mtu);
    }
    let (must, by_socket) = (asked == Mode::ZeroCopy, facts.by_socket.clone());
    let busy_poll = facts.busy_poll.clone();
    XskPlan { zero_copy, must, chunk_size, by_socket, busy_poll, reason }
}

/// The chunk in which packets of an interface with this MTU have room, or the largest; and the longest
/// frame that it takes.
fn chunk_for(mtu: u32) -> (u32, usize) {
    let sizes = CHUNK_SIZES.map(|chunk_size| {
        (chunk_size, XskOptions { chunk_size, ..XskOptions::default() }.packet_len_max())
    });
    let fits = |&(_, takes): &(u32, usize)| mtu as usize + LINK_HEADER_LEN <= takes;
    sizes.into_iter().find(fits).unwrap_or(sizes[CHUNK_SIZES.len() - 1])
}

/// What was chosen, now that XSKs were tried; `bound` is of each queue.
pub fn choice(plan: &Plan, bound: &[Bound]) -> Choice {
    let sockets = |reason: String| Choice { receive: By::Socket, transmit: By::Socket, reason };
    let plan = match plan {
        Plan::Attach => return sockets("it is being attached".to_owned()),
        Plan::Sockets { reason } | Plan::Impossible { reason } => return sockets(reason.clone()),
        Plan::Xsk(plan) => plan,
    };
    let refused = bound.iter().zip(0..).find_map(|(bound, queue)| match bound {
        Bound::Refused(reason) => Some(format!("queue {queue}: {reason}")),
        _ => None,
    });
    let count = |what: &Bound| bound.iter().filter(|bound| *bound == what).count();
    let (zero_copy, copy) = (count(&Bound::ZeroCopy), count(&Bound::Copy));
    if zero_copy + copy == 0 {
        return sockets(refused.unwrap_or_else(|| "it has no queues".to_owned()));
    }
    let by = if zero_copy > 0 { By::ZeroCopy } else { By::Copy };
    // In copy mode an XSK sends no faster than a socket, and much slower than one that sends runs.
    let by_socket = plan.by_socket.as_ref().filter(|_| zero_copy > 0);
    let transmit = if zero_copy > 0 && by_socket.is_none() { By::ZeroCopy } else { By::Socket };
    let mut reason = if zero_copy < plan.zero_copy.len() {
        format!("the driver has zero-copy for {zero_copy} of {}", queues(&plan.zero_copy))
    } else {
        plan.reason.clone()
    };
    if let Some(refused) = refused {
        reason += "; sockets for ";
        reason += &refused;
    }
    if let Some(why) = by_socket {
        reason += &format!("; sockets send: {why}");
    }
    match &plan.busy_poll {
        None => {}
        Some(Ok(())) => reason += "; polled by threads that have work",
        Some(Err(why)) => reason += &format!("; no busy polling: {why}"),
    }
    Choice { receive: by, transmit, reason }
}

/// The queues that get the datagrams to `ports` and nothing else, as the NIC's rules say; `spread` are the
/// queues for what no rule is about, and `context` gives those of an RSS context.
///
/// # Errors
/// Why there are none.
pub fn set_apart(
    ports: &[u16],
    queue_count: u32,
    spread: Option<&[u32]>,
    rules: Option<&[Rule]>,
    context: impl Fn(u32) -> Option<Vec<u32>>,
) -> Result<BTreeSet<u32>, NotApart> {
    if ports.is_empty() {
        return Err(NotApart::NoPort);
    }
    if queue_count < 2 {
        return Err(NotApart::OneQueue);
    }
    let (Some(spread), Some(rules)) = (spread, rules) else { return Err(NotApart::Unknown) };
    let queues_of = |rule: &Rule| match rule.target {
        RuleTarget::Queue(queue) => Ok(vec![queue]),
        RuleTarget::Context(number) => context(number).ok_or(NotApart::Unknown),
        RuleTarget::Drop | RuleTarget::Elsewhere => Ok(Vec::new()),
    };
    let mut others: BTreeSet<u32> = spread.iter().copied().collect();
    let mut ours: BTreeSet<(u16, u32)> = BTreeSet::new();
    for rule in rules {
        match rule.port {
            Some((IpKind::V4 | IpKind::V6, port)) if ports.contains(&port) => {
                ours.extend(queues_of(rule)?.into_iter().map(|queue| (port, queue)));
            }
            _ => others.extend(queues_of(rule)?),
        }
    }
    for &port in ports {
        if !ours.iter().any(|&(of, _)| of == port) {
            return Err(NotApart::NoRule { port });
        }
    }
    match ours.iter().find(|(_, queue)| others.contains(queue)) {
        Some(&(port, queue)) => Err(NotApart::Shared { port, queue }),
        None => Ok(ours.into_iter().map(|(_, queue)| queue).collect()),
    }
}

impl NotApart {
    /// For people, with what would set a queue apart.
    fn with_advice(self, facts: &Facts) -> String {
        let (nic, last) = (&facts.name, facts.queue_count.saturating_sub(1));
        let spread = format!("`ethtool -X {nic} equal {last}`");
        let rules = |port| {
            let rule =
                |ip| format!("`ethtool -N {nic} flow-type udp{ip} dst-port {port} action {last}`");
            format!("{}, {}", rule(4), rule(6))
        };
        match self {
            Self::NoPort => "no port was chosen yet".to_owned(),
            Self::OneQueue => "its one queue is for all traffic".to_owned(),
            Self::Unknown => {
                "its driver does not tell which queues are for our port alone".to_owned()
            }
            Self::NoRule { port } => {
                format!(
                    "no queue is for port {port} alone; {spread}, {} set one apart",
                    rules(port)
                )
            }
            Self::Shared { port, queue } => format!(
                "queue {queue}, to which port {port} comes, is for other traffic, too; {spread} sets the last \
                 queue apart, {} give it the port",
                rules(port)
            ),
        }
    }
}

/// `queues 0, 3`.
fn queues(numbers: &BTreeSet<u32>) -> String {
    let texts: Vec<String> = numbers.iter().map(u32::to_string).collect();
    format!("{} {}", if texts.len() == 1 { "queue" } else { "queues" }, texts.join(", "))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const ALL: XdpFeatures =
        XdpFeatures { native: true, zero_copy: true, multi_buffer: true, zero_copy_segments: 1 };
    const NATIVE: XdpFeatures = XdpFeatures { zero_copy: false, ..ALL };
    const NOTHING: XdpFeatures = XdpFeatures { native: false, ..NATIVE };

    fn facts() -> Facts {
        Facts {
            name: "eth0".to_owned(),
            is_veth: false,
            features: Some(ALL),
            mtu: 1500,
            queue_count: 4,
            apart: Ok(BTreeSet::from([3])),
            attached: Some(Ok(())),
            by_socket: None,
            busy_poll: None,
        }
    }

    fn set<const N: usize>(queues: [u32; N]) -> BTreeSet<u32> {
        BTreeSet::from(queues)
    }

    /// What becomes of a NIC whose driver does as its features say: zero-copy where it is tried if it can.
    fn chosen(asked: Mode, facts: &Facts, can_zero_copy: bool) -> (By, By) {
        let plan = plan(asked, facts);
        let Plan::Xsk(xsk) = &plan else {
            let choice = choice(&plan, &[]);
            return (choice.receive, choice.transmit);
        };
        let bound: Vec<Bound> = (0..facts.queue_count)
            .map(|queue| match (xsk.zero_copy.contains(&queue), can_zero_copy) {
                (true, true) => Bound::ZeroCopy,
                (true, false) if xsk.must => Bound::Refused("no".to_owned()),
                _ => Bound::Copy,
            })
            .collect();
        let choice = choice(&plan, &bound);
        (choice.receive, choice.transmit)
    }

    #[test]
    fn every_row_of_the_design_comes_out() {
        type Row<'a> = (&'a str, &'a Facts, bool, [(By, By); 4]);
        const ZERO_COPY: (By, By) = (By::ZeroCopy, By::ZeroCopy);
        const COPY: (By, By) = (By::Copy, By::Socket);
        const SOCKETS: (By, By) = (By::Socket, By::Socket);
        let shared = Err(NotApart::NoRule { port: 51820 });
        let with = |change: &dyn Fn(&mut Facts)| {
            let mut facts = facts();
            change(&mut facts);
            facts
        };
        let zero_copy = facts();
        let mixed = with(&|facts| facts.apart = shared.clone());
        let native = with(&|facts| facts.features = Some(NATIVE));
        let unknown = with(&|facts| facts.features = None);
        let unknown_mixed = Facts { apart: shared.clone(), ..unknown.clone() };
        let veth = with(&|facts| (facts.is_veth, facts.features) = (true, Some(NATIVE)));
        let nothing = with(&|facts| facts.features = Some(NOTHING));
        let refused = with(&|facts| facts.attached = Some(Err("foreign".to_owned())));
        let rows: [Row<'_>; 10] = [
            // Auto, zerocopy, native, udp.
            ("1", &zero_copy, true, [ZERO_COPY, ZERO_COPY, COPY, SOCKETS]),
            ("1, but the bind says no", &zero_copy, false, [COPY, COPY, COPY, SOCKETS]),
            ("1, but not set apart", &mixed, true, [COPY, ZERO_COPY, COPY, SOCKETS]),
            ("2", &native, false, [COPY, SOCKETS, COPY, SOCKETS]),
            ("an old kernel, and it can", &unknown, true, [ZERO_COPY, ZERO_COPY, COPY, SOCKETS]),
            ("an old kernel, and it cannot", &unknown, false, [COPY, COPY, COPY, SOCKETS]),
            ("an old kernel, shared", &unknown_mixed, true, [COPY, ZERO_COPY, COPY, SOCKETS]),
            ("3 and 3b", &veth, false, [SOCKETS, SOCKETS, COPY, SOCKETS]),
            ("4, as the query says", &nothing, false, [SOCKETS; 4]),
            ("4, as the trial says", &refused, false, [SOCKETS; 4]),
        ];
        let modes = [Mode::Auto, Mode::ZeroCopy, Mode::Native, Mode::Udp];
        for (row, facts, can, expected) in rows {
            for (asked, expected) in modes.into_iter().zip(expected) {
                assert_eq!(chosen(asked, facts, can), expected, "row {row}, {asked:?}");
            }
        }
    }

    #[test]
    fn what_cannot_be_is_an_error_where_it_was_asked_for() {
        let is_impossible = |change: &dyn Fn(&mut Facts)| {
            let mut facts = facts();
            change(&mut facts);
            matches!(plan(Mode::ZeroCopy, &facts), Plan::Impossible { .. })
        };
        assert!(is_impossible(&|facts| facts.features = Some(NATIVE)));
        assert!(is_impossible(&|facts| facts.features = Some(NOTHING)));
        assert!(is_impossible(&|facts| facts.attached = Some(Err(String::new()))));
        assert!(!is_impossible(&|facts| facts.apart = Err(NotApart::OneQueue)));
        assert!(!is_impossible(&|facts| facts.attached = None));
    }

    #[test]
    fn nothing_is_attached_where_nothing_will_come_of_it() {
        let untried = |is_veth, features| Facts { is_veth, features, attached: None, ..facts() };
        for (asked, is_veth, features, attaches) in [
            (Mode::Auto, false, Some(ALL), true),
            (Mode::Auto, false, None, true),
            (Mode::Auto, true, Some(NATIVE), false),
            (Mode::Auto, true, None, false),
            (Mode::Auto, false, Some(NOTHING), false),
            (Mode::Native, true, None, true),
            (Mode::Native, true, Some(NATIVE), true),
            (Mode::Native, false, Some(NOTHING), false),
            (Mode::ZeroCopy, true, Some(NATIVE), false),
            (Mode::ZeroCopy, false, None, true),
            (Mode::Udp, false, Some(ALL), false),
        ] {
            let plan = plan(asked, &untried(is_veth, features));
            assert_eq!(
                plan == Plan::Attach,
                attaches,
                "{asked:?} {is_veth} {features:?}: {plan:?}"
            );
        }
    }

    #[test]
    fn a_chunk_is_as_large_as_the_mtu_wants_and_what_is_longer_is_said() {
        for (mtu, chunk_size, is_said) in [
            (0, 2048, false),
            (1500, 2048, false),
            (1764, 2048, false),
            (1765, 4096, false),
            (3812, 4096, false),
            (3813, 4096, true),
            (9000, 4096, true),
            (u32::MAX, 4096, true),
        ] {
            let Plan::Xsk(plan) = plan(Mode::Native, &Facts { mtu, ..facts() }) else { panic!() };
            assert_eq!(plan.chunk_size, chunk_size, "{mtu}");
            assert_eq!(plan.reason.contains("pass to the socket"), is_said, "{mtu}");
        }
    }

    #[test]
    fn the_reason_says_what_would_set_a_queue_apart() {
        let reason = |why| {
            let facts = Facts { apart: Err(why), ..facts() };
            let Plan::Xsk(plan) = plan(Mode::Auto, &facts) else { panic!() };
            plan.reason
        };
        assert_eq!(
            reason(NotApart::NoRule { port: 51820 }),
            "no zero-copy: no queue is for port 51820 alone; `ethtool -X eth0 equal 3`, `ethtool -N eth0 \
             flow-type udp4 dst-port 51820 action 3`, `ethtool -N eth0 flow-type udp6 dst-port 51820 action 3` \
             set one apart"
        );
        assert_eq!(reason(NotApart::OneQueue), "no zero-copy: its one queue is for all traffic");
        let plan = plan(Mode::Auto, &facts());
        let only = |bound: &[Bound]| choice(&plan, bound).reason;
        let copy = || vec![Bound::Copy; 4];
        assert_eq!(only(&copy()), "the driver has zero-copy for 0 of queue 3");
        let mut bound = copy();
        bound[3] = Bound::ZeroCopy;
        assert_eq!(only(&bound), "queue 3 for our port alone");
        bound[1] = Bound::Refused("busy".to_owned());
        assert_eq!(only(&bound), "queue 3 for our port alone; sockets for queue 1: busy");
    }

    #[test]
    fn xsks_that_would_go_round_the_firewall_do_not_send() {
        let facts = Facts { by_socket: Some("a rule".to_owned()), ..facts() };
        let plan = plan(Mode::Auto, &facts);
        let with = |bound: &[Bound]| choice(&plan, bound);
        let bound = [Bound::Copy, Bound::Copy, Bound::Copy, Bound::ZeroCopy];
        let chosen = with(&bound);
        assert_eq!((chosen.receive, chosen.transmit), (By::ZeroCopy, By::Socket));
        assert_eq!(chosen.reason, "queue 3 for our port alone; sockets send: a rule");
        // Where they would not send anyway, there is nothing to tell.
        let chosen = with(&[const { Bound::Copy }; 4]);
        assert!(chosen.transmit == By::Socket && !chosen.reason.contains("a rule"));
    }

    #[test]
    fn what_comes_of_busy_polling_is_said() {
        let with = |busy_poll: Option<Result<(), &str>>| {
            let busy_poll = busy_poll.map(|can| can.map_err(str::to_owned));
            choice(&plan(Mode::Native, &Facts { busy_poll, ..facts() }), &[Bound::Copy]).reason
        };
        assert_eq!(with(None), "native XDP, as asked for");
        assert_eq!(
            with(Some(Ok(()))),
            "native XDP, as asked for; polled by threads that have work"
        );
        assert_eq!(with(Some(Err("no"))), "native XDP, as asked for; no busy polling: no");
    }

    fn rule(port: Option<u16>, target: RuleTarget) -> Rule {
        Rule { port: port.map(|port| (IpKind::V4, port)), target }
    }

    #[test]
    fn queues_are_set_apart_by_rules_that_nothing_contradicts() {
        use RuleTarget::{Context, Drop, Elsewhere, Queue};
        let first = [0, 1, 2, 0, 1, 2];
        let ours = |target| rule(Some(51820), target);
        let others = |target| rule(None, target);
        let contexts = |number| (number == 1).then(|| vec![3, 4]);
        let ask = |ports: &[u16], spread: &[u32], rules: &[Rule]| {
            set_apart(ports, 5, Some(spread), Some(rules), contexts)
        };
        let one = [51820];
        assert_eq!(ask(&one, &first, &[ours(Queue(3))]), Ok(set([3])));
        assert_eq!(ask(&one, &first, &[ours(Context(1))]), Ok(set([3, 4])));
        assert_eq!(ask(&one, &first, &[ours(Context(2))]), Err(NotApart::Unknown));
        assert_eq!(ask(&one, &first, &[ours(Queue(3)), others(Queue(4))]), Ok(set([3])));
        assert_eq!(ask(&one, &first, &[ours(Queue(3)), others(Drop)]), Ok(set([3])));
        let shared = Err(NotApart::Shared { port: 51820, queue: 3 });
        assert_eq!(ask(&one, &first, &[ours(Queue(3)), others(Queue(3))]), shared);
        assert_eq!(ask(&one, &first, &[ours(Queue(3)), others(Context(1))]), shared);
        assert_eq!(ask(&one, &first, &[ours(Queue(3)), rule(Some(53), Queue(3))]), shared);
        assert_eq!(ask(&one, &[3], &[ours(Queue(3))]), shared);
        let none = Err(NotApart::NoRule { port: 51820 });
        for rules in [vec![], vec![others(Queue(3))], vec![ours(Drop)], vec![ours(Elsewhere)]] {
            assert_eq!(ask(&one, &first, &rules), none, "{rules:?}");
        }
        // Of two ports both have rules, or nothing is set apart.
        let both = [ours(Queue(3)), rule(Some(51821), Queue(4))];
        assert_eq!(ask(&[51820, 51821], &first, &both), Ok(set([3, 4])));
        assert_eq!(ask(&[51820, 7], &first, &both), Err(NotApart::NoRule { port: 7 }));
        assert_eq!(ask(&[], &first, &both), Err(NotApart::NoPort));
        assert_eq!(set_apart(&one, 1, Some(&[0]), Some(&[]), contexts), Err(NotApart::OneQueue));
        assert_eq!(set_apart(&one, 4, None, Some(&both), contexts), Err(NotApart::Unknown));
        assert_eq!(set_apart(&one, 4, Some(&first), None, contexts), Err(NotApart::Unknown));
    }

    proptest! {
        /// Whatever the rules are: no packet that is not ours comes to a queue that is set apart.
        #[test]
        fn nothing_else_comes_to_a_queue_that_is_set_apart(
            spread in prop::collection::vec(0u32..6, 1..8),
            rules in prop::collection::vec((prop::option::of(0u16..4), 0u32..6), 0..8),
        ) {
            let rules: Vec<Rule> =
                rules.into_iter().map(|(port, to)| rule(port, RuleTarget::Queue(to))).collect();
            let ports = [0, 1];
            if let Ok(apart) = set_apart(&ports, 6, Some(&spread), Some(&rules), |_| None) {
                prop_assert!(spread.iter().all(|queue| !apart.contains(queue)));
                for rule in &rules {
                    let RuleTarget::Queue(queue) = rule.target else { unreachable!() };
                    let is_ours = rule.port.is_some_and(|(_, port)| ports.contains(&port));
                    prop_assert_eq!(apart.contains(&queue), is_ours);
                }
            }
        }
    }
}
