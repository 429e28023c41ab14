//! Tunnels between real processes, driven by the real wg(8) and ip(8).
//!
//! ```text
//!  client                                    gateway                   LAN host
//!  boringtun or Tidegate ══ outer (veth) ══ Tidegate ──── lan (veth) ── TCP server
//!  10.9.0.2, fd09::2                         10.9.0.1, fd09::1          192.168.20.2, fd20::2
//! ```

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;

use std::{
    collections::BTreeMap,
    fs::File,
    os::fd::{AsFd, OwnedFd},
    path::Path,
    thread,
    time::{Duration, Instant},
};

use common::{
    Daemon, LIMIT, NATIVE, UDP, assert_answered, public_key, socket, tidegate, value, xdp_program,
};

use rustix::{
    net::{
        AddressFamily, RecvFlags, SendFlags, SocketAddrAny, SocketFlags, SocketType, eth, recvfrom,
        sendto, socket_with,
        sockopt::{Timeout, set_socket_timeout},
    },
    process::Signal,
    thread::{LinkNameSpaceType, move_into_link_name_space},
};
use wg_common::headers::{
    Checksum, ETHERNET_LEN, IPV4_LEN, OuterDatagram, OuterHeaders, parse_frame,
};
use xtask::{
    demonstration::{
        Amount, CLIENT_CONF, GATEWAY_CONF, GATEWAY_INNER, Mode, Options, Programs, Tools, show,
        spawn_peer,
    },
    lab::{
        self, CLIENT_V4, CLIENT_V6, GATEWAY_V4, GATEWAY_V6, HOST_V4, HOST_V6, Lab, OUTER, Space,
    },
};

const CLIENT_INNER: [&str; 2] = ["10.9.0.2", "fd09::2"];
/// What a test needs, unless it must be skipped.
fn lab(test: &str) -> Option<(Lab, Programs)> {
    if let Some(reason) = lab::unavailable() {
        eprintln!("SKIPPED {test}: {reason}");
        return None;
    }
    Some((Lab::new().unwrap(), programs()))
}

fn programs() -> Programs {
    Programs::in_folder(tidegate().parent().unwrap()).unwrap()
}

fn as_run(test: &str, mode: Mode) {
    if let Some(reason) = lab::unavailable() {
        eprintln!("SKIPPED {test}: {reason}");
        return;
    }
    let folder = tidegate().parent().unwrap().to_owned();
    let options = Options {
        programs: folder,
        mode,
        report: None,
        keep: false,
        rootless: false,
        lifeline: false,
    };
    let report = show(&programs(), &options, Amount::SMALL).unwrap();
    println!("{}", report.table());
    assert_eq!(report.exit_code, 0, "{report:#?}");
    assert_eq!(report.mode, mode.word());
    assert!(report.hashes_equal);
    assert_eq!(report.steered > 0, mode == Mode::Native);
}

#[test]
fn as_run_in_native_mode() {
    as_run("as_run_in_native_mode", Mode::Native);
}

#[test]
fn as_run_in_udp_mode() {
    as_run("as_run_in_udp_mode", Mode::Udp);
}

fn two_tidegates(test: &str, endpoint: &str) {
    let Some((lab, programs)) = lab(test) else { return };
    let gateway = Daemon::start(&lab.gateway, &lab.interface('g'), NATIVE);
    gateway.configure(&lab, GATEWAY_CONF);
    let client = Daemon::start(&lab.client, &lab.interface('c'), UDP);
    client.configure(&lab, &CLIENT_CONF.replace(GATEWAY_V4, endpoint));

    assert_answered(&lab.client, &[GATEWAY_INNER[0], GATEWAY_INNER[1], HOST_V4, HOST_V6]);
    assert_answered(&lab.host, &CLIENT_INNER);
    let transfers = Tools::start(&lab, &programs).unwrap().files(1 << 20).unwrap();
    assert!(transfers.iter().all(|transfer| transfer.equal), "{transfers:?}");

    let gateway_port = value(GATEWAY_CONF, "ListenPort");
    assert_eq!(client.dump()[1][2], format!("{endpoint}:{gateway_port}"));
    for (ours, theirs) in [(&gateway, &client), (&client, &gateway)] {
        let (ours, theirs) = (ours.dump(), theirs.dump());
        assert_ne!(ours[1][4], "0", "no handshake: {ours:?}");
        let number = |fields: &[String], at: usize| fields[at].parse::<u64>().unwrap();
        assert!(number(&ours[1], 5) > 1 << 20 && number(&theirs[1], 6) > 1 << 20);
    }
}

#[test]
fn two_tidegates_talk_over_ipv4() {
    two_tidegates("two_tidegates_talk_over_ipv4", GATEWAY_V4);
}

#[test]
fn two_tidegates_talk_over_ipv6() {
    two_tidegates("two_tidegates_talk_over_ipv6", &format!("[{GATEWAY_V6}]"));
}

/// The role in which boringtun initiates by IPv4 is the one of `as_run_…`.
#[test]
fn boringtun_initiates_over_ipv6() {
    let Some((lab, programs)) = lab("boringtun_initiates_over_ipv6") else { return };
    let gateway = Daemon::start(&lab.gateway, &lab.interface('g'), NATIVE);
    gateway.configure(&lab, GATEWAY_CONF);
    let conf = CLIENT_CONF.replace(GATEWAY_V4, &format!("[{GATEWAY_V6}]"));
    let mut client = spawn_peer(&lab, &programs, &conf, &["--initiate"]).unwrap();
    assert_eq!(client.event("handshake", LIMIT).unwrap()["role"], "initiator");

    assert_answered(&lab.client, &[GATEWAY_INNER[0], GATEWAY_INNER[1], HOST_V4, HOST_V6]);
    assert_answered(&lab.host, &CLIENT_INNER);
    assert!(gateway.dump()[1][2].starts_with(&format!("[{CLIENT_V6}]:")));
    assert!(gateway.status().paths["xsk"] > 0);
}

fn boringtun_responds(test: &str, options: &[&str], address: &str) {
    let Some((lab, programs)) = lab(test) else { return };
    let listens = CLIENT_CONF
        .replace("[Interface]", "[Interface]\nListenPort = 51821")
        .replace("Endpoint =", "# Endpoint =");
    let mut client = spawn_peer(&lab, &programs, &listens, &[]).unwrap();
    let gateway = Daemon::start(&lab.gateway, &lab.interface('g'), options);
    gateway.configure(&lab, &format!("{GATEWAY_CONF}Endpoint = {address}:51821\n"));

    assert_answered(&lab.host, &CLIENT_INNER);
    assert_eq!(client.event("handshake", LIMIT).unwrap()["role"], "responder");
    assert_answered(&lab.client, &[HOST_V4, HOST_V6]);
}

#[test]
fn boringtun_responds_in_native_mode() {
    boringtun_responds("boringtun_responds_in_native_mode", NATIVE, CLIENT_V4);
}

#[test]
fn boringtun_responds_over_ipv6() {
    boringtun_responds("boringtun_responds_over_ipv6", NATIVE, &format!("[{CLIENT_V6}]"));
}

#[test]
fn boringtun_responds_in_udp_mode() {
    boringtun_responds("boringtun_responds_in_udp_mode", UDP, CLIENT_V4);
}

#[test]
fn a_preshared_key_that_differs_keeps_a_peer_out() {
    let test = "a_preshared_key_that_differs_keeps_a_peer_out";
    let Some((lab, programs)) = lab(test) else { return };
    let gateway = Daemon::start(&lab.gateway, &lab.interface('g'), UDP);
    gateway.configure(&lab, GATEWAY_CONF);
    let other = CLIENT_CONF.replace("PresharedKey", "#PresharedKey");
    let mut client = spawn_peer(&lab, &programs, &other, &["--initiate"]).unwrap();
    assert!(client.event("handshake", Duration::from_secs(3)).is_err());
    assert_eq!(lab.client.ping(GATEWAY_INNER[0], 2, &[]).unwrap().answered, 0);
}

#[test]
fn the_real_wg_configures_and_shows_a_daemon() {
    let Some((lab, _)) = lab("the_real_wg_configures_and_shows_a_daemon") else { return };
    let daemon = Daemon::start(&lab.gateway, &lab.interface('g'), UDP);
    let interface = daemon.interface.as_str();
    let empty = daemon.dump();
    assert_eq!((empty.len(), empty[0][0].as_str(), empty[0][3].as_str()), (1, "(none)", "off"));

    let private_key = value(GATEWAY_CONF, "PrivateKey");
    let preshared_key = value(GATEWAY_CONF, "PresharedKey");
    let peer = value(GATEWAY_CONF, "PublicKey");
    let private_file = lab.write("gateway.key", private_key).unwrap();
    let preshared_file = lab.write("gateway.psk", preshared_key).unwrap();
    let (private_file, preshared_file) =
        (private_file.to_str().unwrap(), preshared_file.to_str().unwrap());
    daemon.wg(&["set", interface, "private-key", private_file, "listen-port", "51820"]);
    daemon.wg(&["set", interface, "fwmark", "0x1f"]);
    daemon.wg(&["set", interface, "peer", peer, "preshared-key", preshared_file]);
    daemon.wg(&["set", interface, "peer", peer, "endpoint", "[2001:db8:51::2]:7"]);
    daemon.wg(&["set", interface, "peer", peer, "persistent-keepalive", "25"]);
    daemon.wg(&["set", interface, "peer", peer, "allowed-ips", "10.9.0.2/32,fd09::/64"]);

    let own_key = public_key(&lab.gateway, &lab, private_key);
    let dump = daemon.dump();
    assert_eq!(dump[0], [private_key, &own_key, "51820", "0x1f"]);
    let shown: Vec<_> = [0, 1, 2, 3, 4, 7].map(|field| dump[1][field].as_str()).into();
    let allowed_ips = "10.9.0.2/32,fd09::/64";
    assert_eq!(shown, [peer, preshared_key, "[2001:db8:51::2]:7", allowed_ips, "0", "25"]);
    let text = daemon.wg(&["show", interface]);
    for part in ["listening port: 51820", "persistent keepalive: every 25 seconds", peer] {
        assert!(text.contains(part), "{part} in\n{text}");
    }

    // What it shows is what it takes.
    let conf = daemon.wg(&["showconf", interface]);
    let file = lab.write("shown.conf", &conf).unwrap();
    daemon.wg(&["set", interface, "peer", peer, "remove"]);
    assert_eq!(daemon.dump().len(), 1);
    daemon.wg(&["setconf", interface, file.to_str().unwrap()]);
    assert_eq!(daemon.wg(&["showconf", interface]), conf);

    // A prefix moves to the peer that is given it last.
    // The device's own key is no peer.
    daemon.wg(&["set", interface, "peer", &own_key, "allowed-ips", "10.9.0.2/32"]);
    assert_eq!(daemon.dump().len(), 2);
    assert_eq!(daemon.dump()[1][3], allowed_ips);
    let fresh = daemon.wg(&["genkey"]);
    let fresh = public_key(&lab.gateway, &lab, fresh.trim());
    daemon.wg(&["set", interface, "peer", &fresh, "allowed-ips", "10.9.0.2/32"]);
    let dump = daemon.dump();
    let of = |key: &str| dump.iter().find(|line| line[0] == key).unwrap()[3].clone();
    assert_eq!((of(peer), of(&fresh)), ("fd09::/64".to_owned(), "10.9.0.2/32".to_owned()));
}

#[test]
fn a_source_that_its_sender_does_not_own_is_dropped_and_counted() {
    let test = "a_source_that_its_sender_does_not_own_is_dropped_and_counted";
    let Some((lab, programs)) = lab(test) else { return };
    let gateway = Daemon::start(&lab.gateway, &lab.interface('g'), NATIVE);
    gateway.configure(&lab, GATEWAY_CONF);
    let conf = CLIENT_CONF.replace("Address = ", "Address = 10.9.0.77/24, fd09::77/64, ");
    let _client = spawn_peer(&lab, &programs, &conf, &["--initiate"]).unwrap();

    let own = lab.client.ping(HOST_V4, 3, &["-I", CLIENT_INNER[0]]).unwrap();
    assert_eq!(own.answered, 3);
    let before = gateway.status().drops.get("source_not_allowed").copied().unwrap_or(0);
    for (to, from) in [(HOST_V4, "10.9.0.77"), (HOST_V6, "fd09::77")] {
        let ping = lab.client.ping(to, 3, &["-I", from]).unwrap();
        assert_eq!(ping.answered, 0, "{from}");
    }
    let after = gateway.status().drops.get("source_not_allowed").copied().unwrap_or(0);
    assert!(after - before >= 6, "{before} and {after}");
}

/// The frames of a namespace: a socket that reads and writes them on all of its links.
struct Wire(OwnedFd);

impl Wire {
    fn of(space: &Space) -> Wire {
        let namespace = File::open(Path::new("/run/netns").join(space.name())).unwrap();
        // A namespace belongs to a thread, a socket stays in the one where it was made.
        let open = || {
            let kind = Some(LinkNameSpaceType::Network);
            move_into_link_name_space(namespace.as_fd(), kind).unwrap();
            let (family, flags) = (AddressFamily::PACKET, SocketFlags::CLOEXEC);
            socket_with(family, SocketType::RAW, flags, Some(eth::ALL)).unwrap()
        };
        let socket = thread::scope(|scope| scope.spawn(open).join().unwrap());
        set_socket_timeout(&socket, Timeout::Recv, Some(LIMIT)).unwrap();
        Wire(socket)
    }

    /// The next frame with a UDP datagram that `wanted` accepts, and the link that it is on.
    fn capture(&self, wanted: impl Fn(&OuterDatagram) -> bool) -> (Vec<u8>, SocketAddrAny) {
        let mut buffer = [0; 2048];
        loop {
            let (_, len, link) = recvfrom(&self.0, &mut buffer, RecvFlags::empty()).unwrap();
            let frame = &buffer[..len];
            if parse_frame(frame).is_some_and(|datagram| wanted(&datagram)) {
                return (frame.to_vec(), link.unwrap());
            }
        }
    }

    fn send(&self, frame: &[u8], link: &SocketAddrAny) {
        assert_eq!(sendto(&self.0, frame, SendFlags::empty(), link).unwrap(), frame.len());
    }
}

/// A captured IPv4 datagram again, from another port, and with an IP option that does nothing but
/// make XDP leave the frame to the kernel.
fn with_option(captured: &[u8], port: u16) -> Vec<u8> {
    const OPTIONS_AT: usize = ETHERNET_LEN + IPV4_LEN;
    const NOP_NOP_NOP_END: [u8; 4] = [1, 1, 1, 0];
    let mut datagram = parse_frame(captured).unwrap();
    datagram.src.set_port(port);
    let headers = OuterHeaders {
        dst_mac: *captured.first_chunk().unwrap(),
        src_mac: *captured[6..].first_chunk().unwrap(),
        tags: [None, None],
        src: datagram.src,
        dst: datagram.dst,
        tos: datagram.tos,
        ttl: 64,
        id: 0,
    };
    // Written anew for the UDP checksum, which is unfinished in what a veth sends.
    let mut frame = captured[..datagram.payload.end].to_vec();
    headers.write(&mut frame).unwrap();
    frame.splice(OPTIONS_AT..OPTIONS_AT, NOP_NOP_NOP_END);
    let total_len = u16::try_from(frame.len() - ETHERNET_LEN).unwrap();
    let ip = &mut frame[ETHERNET_LEN..OPTIONS_AT + NOP_NOP_NOP_END.len()];
    ip[0] = 0x46;
    ip[2..4].copy_from_slice(&total_len.to_be_bytes());
    ip[10..12].fill(0);
    let sum = Checksum::default().bytes(ip).finish();
    ip[10..12].copy_from_slice(&sum.to_be_bytes());
    frame
}

#[test]
fn a_capture_replayed_by_another_path_is_refused() {
    let Some((lab, programs)) = lab("a_capture_replayed_by_another_path_is_refused") else {
        return;
    };
    let options = [NATIVE, &["--workers", "2"]].concat();
    let gateway = Daemon::start(&lab.gateway, &lab.interface('g'), &options);
    gateway.configure(&lab, GATEWAY_CONF);
    let mut client = spawn_peer(&lab, &programs, CLIENT_CONF, &["--initiate"]).unwrap();
    client.event("handshake", LIMIT).unwrap();

    let wire = Wire::of(&lab.client);
    assert_eq!(lab.client.ping(HOST_V4, 3, &["-s", "400"]).unwrap().answered, 3);
    let to_gateway = format!("{GATEWAY_V4}:{}", value(GATEWAY_CONF, "ListenPort"));
    let (captured, link) = wire
        .capture(|datagram| datagram.dst.to_string() == to_gateway && datagram.payload.len() > 400);
    let sender = parse_frame(&captured).unwrap().src;
    let endpoint = || gateway.dump()[1][2].clone();
    assert_eq!(endpoint(), sender.to_string());
    let count = |counts: &BTreeMap<String, u64>, name| counts.get(name).copied().unwrap_or(0);
    let replays = || count(&gateway.status().drops, "replay");
    let steer = |event| count(&gateway.status().steer, event);
    assert_eq!(replays(), 0);

    // So many ports that the kernel chooses the socket of either worker for some.
    let ports = [sender.port()].into_iter().chain(20_000..20_032);
    let by_socket: Vec<_> = ports.map(|port| with_option(&captured, port)).collect();
    // While a worker is kept off its core, XDP passes its frames to the kernel, which drops this one
    // for its unfinished checksum: it is sent until it is steered.
    let steered = steer("steered");
    let refused = lab::wait_for("a replay by the XSK", LIMIT, || {
        wire.send(&captured, &link);
        thread::sleep(Duration::from_millis(300));
        Ok((replays() > 0).then_some(()))
    });
    refused.unwrap_or_else(|error| panic!("{error:#}: {:?}", gateway.status()));
    assert!(steer("steered") > steered, "{:?}", gateway.status());
    assert_eq!(endpoint(), sender.to_string());

    let (before, passed) = (replays(), steer("passed_foreign"));
    by_socket.iter().for_each(|frame| wire.send(frame, &link));
    let expected = before + by_socket.len() as u64;
    let refused =
        lab::wait_for("replays by sockets", LIMIT, || Ok((replays() >= expected).then_some(())));
    refused.unwrap_or_else(|error| panic!("{error:#}: {:?}", gateway.status()));
    assert!(steer("passed_foreign") - passed >= by_socket.len() as u64, "{:?}", gateway.status());
    assert_eq!(endpoint(), sender.to_string());

    assert_eq!(lab.client.ping(HOST_V4, 3, &[]).unwrap().answered, 3);
    assert_eq!(replays(), expected);
}

#[test]
fn deleting_the_interface_ends_the_daemon() {
    let Some((lab, _)) = lab("deleting_the_interface_ends_the_daemon") else { return };
    let gateway = Daemon::start(&lab.gateway, &lab.interface('g'), NATIVE);
    gateway.configure(&lab, GATEWAY_CONF);
    lab.gateway.ip(&format!("link delete dev {}", gateway.interface)).unwrap();
    gateway.ends_cleanly();
    assert_eq!(xdp_program(&lab), None, "its XDP program is left");
}

#[test]
fn sigterm_ends_the_daemon_and_leaves_no_program_on_the_nic() {
    let test = "sigterm_ends_the_daemon_and_leaves_no_program_on_the_nic";
    let Some((lab, _)) = lab(test) else { return };
    for signal in [Signal::TERM, Signal::INT] {
        let gateway = Daemon::start(&lab.gateway, &lab.interface('g'), NATIVE);
        gateway.configure(&lab, GATEWAY_CONF);
        assert_eq!(gateway.status().mode, "native");
        assert!(xdp_program(&lab).is_some());
        gateway.process.signal(signal).unwrap();
        gateway.ends_cleanly();
        assert_eq!(xdp_program(&lab), None, "its XDP program is left");
    }
}

#[test]
fn a_foreign_xdp_program_is_not_replaced() {
    let Some((lab, programs)) = lab("a_foreign_xdp_program_is_not_replaced") else { return };
    // To each other, two daemons are foreigners.
    let first = Daemon::start(&lab.gateway, &lab.interface('f'), NATIVE);
    let program = xdp_program(&lab);
    assert!(program.is_some());
    let gateway = Daemon::start(&lab.gateway, &lab.interface('g'), NATIVE);
    gateway.configure(&lab, GATEWAY_CONF);
    let status = gateway.status();
    assert_eq!(status.mode, "udp");
    assert!(status.reason.is_some_and(|reason| reason.contains(OUTER)), "no reason");
    assert_eq!(xdp_program(&lab), program);

    let _client = spawn_peer(&lab, &programs, CLIENT_CONF, &["--initiate"]).unwrap();
    assert_answered(&lab.client, &[HOST_V4, HOST_V6]);
    assert_eq!(first.status().mode, "native");
}

/// Traffic goes on while a worker stands still, at most five seconds later.
fn stalled_worker(test: &str, options: &[&str], worker: usize) {
    const STALL_AFTER: Duration = Duration::from_secs(4);
    if !cfg!(debug_assertions) {
        eprintln!("SKIPPED {test}: the daemon can be told to stall in debug builds only");
        return;
    }
    let Some((lab, programs)) = lab(test) else { return };
    let stall = format!("{worker}:{}", STALL_AFTER.as_millis());
    let options = [options, &["--workers", "2"]].concat();
    let stall = [("TIDEGATE_TEST_STALL_WORKER", stall.as_str())];
    let started = Instant::now();
    let gateway = Daemon::start_with(&lab.gateway, &lab.interface('g'), &options, &stall);
    gateway.configure(&lab, GATEWAY_CONF);
    let _client = spawn_peer(&lab, &programs, CLIENT_CONF, &["--initiate"]).unwrap();
    assert_eq!(lab.client.ping(HOST_V4, 3, &[]).unwrap().answered, 3);

    // Every flow may take another way through the workers: several must go on.
    let stalled_for = || started.elapsed().saturating_sub(STALL_AFTER);
    lab::wait_for("the stall", STALL_AFTER * 2, || Ok((!stalled_for().is_zero()).then_some(())))
        .unwrap();
    let resumed = lab::wait_for("traffic after the stall", Duration::from_secs(15), || {
        for to in [HOST_V4, HOST_V6, GATEWAY_INNER[0], GATEWAY_INNER[1]] {
            if lab.client.ping(to, 1, &["-W", "1"])?.answered == 0 {
                return Ok(None);
            }
        }
        Ok(Some(stalled_for()))
    });
    let resumed = resumed.unwrap();
    println!("all flows were answered again {resumed:?} after the stall");
    // The rounds of echo requests that were not answered take their time, too.
    assert!(resumed < Duration::from_secs(7), "{resumed:?}");
    let transfers = Tools::start(&lab, &programs).unwrap().files(1 << 20).unwrap();
    assert!(transfers.iter().all(|transfer| transfer.equal), "{transfers:?}");
}

#[test]
fn a_stalled_worker_0_does_not_stop_the_tunnel_in_native_mode() {
    stalled_worker("a_stalled_worker_0_does_not_stop_the_tunnel_in_native_mode", NATIVE, 0);
}

#[test]
fn a_stalled_worker_0_does_not_stop_the_tunnel_in_udp_mode() {
    stalled_worker("a_stalled_worker_0_does_not_stop_the_tunnel_in_udp_mode", UDP, 0);
}

#[test]
fn a_stalled_worker_1_does_not_stop_the_tunnel_in_udp_mode() {
    stalled_worker("a_stalled_worker_1_does_not_stop_the_tunnel_in_udp_mode", UDP, 1);
}

#[test]
fn bad_input_starts_nothing() {
    let Some((lab, _)) = lab("bad_input_starts_nothing") else { return };
    let interface = lab.interface('g');
    for (what, conf) in [
        ("key", GATEWAY_CONF.replace("PublicKey = ", "PublicKey = x")),
        ("prefix", GATEWAY_CONF.replace("10.9.0.2/32", "10.9.0.2/33")),
        ("unknown key", GATEWAY_CONF.replace("ListenPort", "ListenPorts")),
        ("later", GATEWAY_CONF.replace("[Interface]", "[Interface]\n#! Metrics = 127.0.0.1:9586")),
    ] {
        let file = lab.write(&format!("{interface}.conf"), &conf).unwrap();
        let mut up = lab.gateway.command(tidegate());
        let mut up = lab.gateway.spawn("tidegate-up", up.arg("up").arg(file)).unwrap();
        let status = up.wait(LIMIT).unwrap();
        assert_eq!(status.code(), Some(3), "{what}: {}", up.errors());
        assert!(up.errors().contains(".conf:"), "{what}: no position in {}", up.errors());
        assert!(!lab.gateway.has_interface(&interface) && !socket(&interface).exists(), "{what}");
    }
}
