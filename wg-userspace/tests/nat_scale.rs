//! Many short flows through a pool of the usual size. The hosts are drawn in `nat_site`.
//!
//! 24,000 flows run each time, with timeouts cut to a twentieth, so that their end is seen. `TIDEGATE_TEST_FLOWS=200000`
//! has so many run, with the timeouts that hold otherwise: that takes some minutes, and more flows than there are ports.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;
mod nat_site;

use std::{
    collections::{BTreeMap, HashMap},
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream, UdpSocket},
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    time::{Duration, Instant},
};

use nat_site::{
    GATEWAY, HOST, LAYOUT, LIMIT, MASQUERADE, Tunnel, inside, ip, is_answered, skips, tunnel,
};
use serde_json::Value;
use socket2::{Domain, Socket, Type};
use xtask::lab::Site;

const FLOWS: u64 = 24_000;
/// One flow of TCP comes to so many of UDP.
const UDP_PER_TCP: u64 = 5;
/// Datagrams under way at a time: fewer than any queue on the way takes.
const WINDOW: u64 = 100;
/// Who asks: 10.9.1.1 and those behind it.
const ASKERS: u64 = 16;
/// Ports of the host that answer.
const ANSWERERS: usize = 4;
const TCP_THREADS: u64 = 3;
/// After so long an answer is taken to be lost.
const PATIENCE: Duration = Duration::from_millis(400);

/// Answers each datagram with what it says; counts them.
fn answer(socket: &UdpSocket, heard: &AtomicU64, is_over: &AtomicBool) {
    let mut buffer = [0; 64];
    while !is_over.load(Ordering::Relaxed) {
        let Ok((len, from)) = socket.recv_from(&mut buffer) else { continue };
        assert_eq!(from.ip(), ip(GATEWAY), "nobody is seen untranslated");
        heard.fetch_add(1, Ordering::Relaxed);
        socket.send_to(&buffer[..len], from).unwrap();
    }
}

/// A question of its own socket.
struct Asker {
    socket: UdpSocket,
    number: u64,
    to: SocketAddr,
    asked: Instant,
}

impl Asker {
    fn new(number: u64, to: SocketAddr) -> Self {
        let from = format!("10.9.1.{}", number % ASKERS + 1);
        let socket = UdpSocket::bind((from.as_str(), 0)).unwrap();
        socket.set_nonblocking(true).unwrap();
        Self { socket, number, to, asked: Instant::now() }
    }

    fn ask(&mut self) {
        self.asked = Instant::now();
        assert_eq!(self.socket.send_to(&self.number.to_be_bytes(), self.to).unwrap(), 8);
    }

    fn is_answered(&self) -> bool {
        let mut buffer = [0; 64];
        match self.socket.recv_from(&mut buffer) {
            Ok((len, from)) => {
                assert_eq!(from, self.to);
                assert_eq!(buffer[..len], self.number.to_be_bytes(), "an answer to another flow");
                true
            }
            Err(_) => false,
        }
    }
}

/// Asks `count` questions, each from a socket of its own and until it is answered; gives how many were sent.
fn ask(count: u64, to: &[SocketAddr]) -> u64 {
    let (mut asked, mut begun) = (0, 0);
    let mut open: Vec<Asker> = Vec::new();
    let mut progress = Instant::now();
    while begun < count || !open.is_empty() {
        while begun < count && (open.len() as u64) < WINDOW {
            let mut asker = Asker::new(begun, to[begun as usize % to.len()]);
            asker.ask();
            (asked, begun) = (asked + 1, begun + 1);
            open.push(asker);
        }
        let before = open.len();
        open.retain(|asker| !asker.is_answered());
        if open.len() != before {
            progress = Instant::now();
            continue;
        }
        assert!(progress.elapsed() < LIMIT, "{} flows of {begun} get no answer", open.len());
        for asker in open.iter_mut().filter(|asker| asker.asked.elapsed() > PATIENCE) {
            asker.ask();
            asked += 1;
        }
        std::thread::sleep(Duration::from_micros(500));
    }
    asked
}

/// Connections of TCP, one after the other, each with its own number to and fro.
fn connect(count: u64, to: SocketAddr) {
    for number in 0..count {
        let mut stream = TcpStream::connect_timeout(&to, LIMIT).unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        stream.write_all(&number.to_be_bytes()).unwrap();
        let mut answer = [0; 8];
        stream.read_exact(&mut answer).unwrap();
        assert_eq!(answer, number.to_be_bytes(), "an answer to another flow");
    }
}

/// Sends each connection's eight bytes back.
fn serve(listener: &TcpListener, is_over: &AtomicBool) {
    listener.set_nonblocking(true).unwrap();
    while !is_over.load(Ordering::Relaxed) {
        let Ok((mut stream, from)) = listener.accept() else {
            std::thread::sleep(Duration::from_micros(200));
            continue;
        };
        assert_eq!(from.ip(), ip(GATEWAY));
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        let mut bytes = [0; 8];
        stream.read_exact(&mut bytes).unwrap();
        stream.write_all(&bytes).unwrap();
    }
}

fn counts(shown: &Value, what: &str) -> BTreeMap<String, u64> {
    let found = shown[what].as_object().unwrap().iter();
    found.map(|(name, count)| (name.clone(), count.as_u64().unwrap())).collect()
}

/// Runs something, and looks meanwhile whether control answers: `show` fails if the thread that sweeps does not answer it
/// in a few seconds.
fn watched<R>(gateway: &Tunnel<'_>, body: impl FnOnce(&AtomicBool) -> R) -> R {
    let is_over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let looks = scope.spawn(|| {
            let mut looks = 0;
            while !is_over.load(Ordering::Relaxed) {
                gateway.nat();
                looks += 1;
                std::thread::sleep(Duration::from_secs(1));
            }
            looks
        });
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| body(&is_over)));
        is_over.store(true, Ordering::Relaxed);
        assert!(looks.join().unwrap() > 0);
        outcome.unwrap()
    })
}

/// So many questions by UDP; how many were sent, and how many came.
fn run_udp(site: &Site, gateway: &Tunnel<'_>, count: u64) -> (u64, u64) {
    let sockets: Vec<UdpSocket> = inside(site.space("host"), || {
        let bind = |_| {
            let socket = Socket::new(Domain::IPV4, Type::DGRAM, None).unwrap();
            socket.set_recv_buffer_size(4 << 20).unwrap();
            socket.bind(&SocketAddr::new(ip(HOST), 0).into()).unwrap();
            socket.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
            socket.into()
        };
        (0..ANSWERERS).map(bind).collect()
    });
    let to: Vec<SocketAddr> = sockets.iter().map(|socket| socket.local_addr().unwrap()).collect();
    let heard = AtomicU64::new(0);
    let asked = watched(gateway, |is_over| {
        std::thread::scope(|scope| {
            for socket in &sockets {
                let heard = &heard;
                scope.spawn(move || answer(socket, heard, is_over));
            }
            let asking = scope.spawn(|| inside(site.space("client"), || ask(count, &to))).join();
            // What was repeated may still be under way.
            std::thread::sleep(2 * PATIENCE);
            is_over.store(true, Ordering::Relaxed);
            asking.unwrap()
        })
    });
    (asked, heard.into_inner())
}

/// So many connections of TCP, of each of a few threads.
fn run_tcp(site: &Site, gateway: &Tunnel<'_>, count: u64) {
    let listeners: Vec<TcpListener> = inside(site.space("host"), || {
        (0..TCP_THREADS).map(|_| TcpListener::bind((HOST, 0)).unwrap()).collect()
    });
    watched(gateway, |is_over| {
        std::thread::scope(|scope| {
            for listener in &listeners {
                scope.spawn(move || serve(listener, is_over));
            }
            let connecting: Vec<_> = listeners
                .iter()
                .map(|listener| {
                    let to = listener.local_addr().unwrap();
                    scope.spawn(move || inside(site.space("client"), || connect(count, to)))
                })
                .collect();
            let outcomes: Vec<_> = connecting.into_iter().map(|thread| thread.join()).collect();
            is_over.store(true, Ordering::Relaxed);
            outcomes.into_iter().for_each(|outcome| outcome.unwrap());
        });
    });
}

#[test]
fn many_short_flows_pass_and_leave_nothing_behind() {
    if skips("many_short_flows_pass_and_leave_nothing_behind", &["ping"]) {
        return;
    }
    let by_hand: Option<u64> =
        std::env::var("TIDEGATE_TEST_FLOWS").ok().map(|text| text.parse().unwrap());
    let (count, hooks, limit) = match by_hand {
        Some(count) => (count, &[][..], Duration::from_secs(300)),
        None => (FLOWS, &[("TIDEGATE_TEST_NAT_HASTE", "20")][..], LIMIT),
    };
    let each = count / (UDP_PER_TCP + 1) / TCP_THREADS;
    let site = Site::new(&LAYOUT).unwrap();
    let [gateway, client] = tunnel(&site, MASQUERADE, hooks);
    for number in 1..=ASKERS {
        client.space.ip(&format!("addr add 10.9.1.{number}/32 dev {}", client.interface)).unwrap();
    }
    assert!(is_answered(&site), "{}", gateway.nat());

    // A ping may have come before the programs knew its owner.
    let (before, dropped) = (counts(&gateway.nat(), "events"), counts(&gateway.nat(), "drops"));
    let drops_since = |shown: &Value| -> BTreeMap<String, u64> {
        let all = counts(shown, "drops").into_iter();
        all.map(|(name, count)| {
            let earlier = dropped.get(&name).copied().unwrap_or(0);
            (name, count - earlier)
        })
        .collect()
    };
    let began = Instant::now();
    let questions = count - each * TCP_THREADS;
    let (asked, heard) = run_udp(&site, &gateway, questions);
    let shown = gateway.nat();
    let (drops, events) = (drops_since(&shown), counts(&shown, "events"));
    eprintln!(
        "{count} flows, UDP after {:?}: asked {asked}, heard {heard}, {drops:?}, {events:?}, {} flows, {}",
        began.elapsed(),
        shown["flow_count"],
        shown["externals"][0]["used"],
    );
    // What came to NAT went on, both ways, but for new flows while ports or room for flows had run out.
    let scarce: u64 = ["no_port", "flows_full"].iter().filter_map(|name| drops.get(*name)).sum();
    assert_eq!(drops.values().sum::<u64>(), scarce, "{drops:?}");
    assert!(by_hand.is_some() || scarce == 0, "there are ports enough: {drops:?}");
    let since = |name: &str| events[name] - before.get(name).copied().unwrap_or(0);
    // Under pressure a port may go while its first packet in five seconds is under way: the answer then comes to a port
    // that nobody has, and is left to the kernel.
    let too_late = heard - since("translated_in");
    assert!(too_late <= since("passed_foreign"), "{too_late} of {heard}: {events:?}");
    assert!(by_hand.is_some() || too_late == 0, "{too_late} of {heard}: {events:?}");
    // Who hears of an answer twice may say that nobody waits for it any more.
    let errors = since("translated_out") - heard;
    assert!(errors <= asked - questions, "{errors} errors after {asked} of {questions}");

    run_tcp(&site, &gateway, each);
    let shown = gateway.nat();
    let drops = drops_since(&shown);
    eprintln!(
        "TCP after {:?}: {drops:?}, {} flows, {}",
        began.elapsed(),
        shown["flow_count"],
        shown["externals"][0]["used"],
    );
    let scarce: u64 = ["no_port", "flows_full"].iter().filter_map(|name| drops.get(*name)).sum();
    assert_eq!(drops.values().sum::<u64>(), scarce, "{drops:?}");

    // Whose time has passed goes, and their ports are free again.
    let ended = Instant::now() + limit;
    loop {
        let shown = gateway.nat();
        let used: HashMap<String, u64> =
            serde_json::from_value(shown["externals"][0]["used"].clone()).unwrap();
        if shown["flow_count"].as_u64().unwrap() <= 4 && used["udp"] == 0 && used["tcp"] == 0 {
            break;
        }
        assert!(Instant::now() < ended, "{} flows, {used:?}", shown["flow_count"]);
        std::thread::sleep(Duration::from_millis(250));
    }
    eprintln!("nothing is left after {:?}", began.elapsed());
    assert!(is_answered(&site));
}
