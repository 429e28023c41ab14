//! The real wg(8) against the real daemon: every word of it, files back and forth, many peers, and
//! clients of the socket that nobody would want.
//!
//! ```text
//!  client                         gateway
//!  outer 198.51.100.2 ─────────── outer 198.51.100.1
//!  daemon (udp) ═════════════════ daemon (udp)
//!  wireguard-go                   (its answers beside ours)
//! ```

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;

use std::{
    fmt::Write as _,
    fs,
    io::{Read, Write},
    net::{Ipv4Addr, Shutdown},
    os::unix::net::UnixStream,
    path::Path,
    thread,
    time::{Duration, Instant},
};

use common::{Daemon, LIMIT, UDP, socket};
use wg_userspace::{
    key::{PresharedKey, PrivateKey, PublicKey},
    sys::netns::report_skipped,
};
use xtask::{
    demonstration::{CLIENT_CONF, GATEWAY_CONF, GATEWAY_INNER},
    lab::{self, Lab, find_program},
};

/// The namespaces, unless the test must be skipped.
fn lab(test: &str) -> Option<Lab> {
    let missing = find_program("wg").is_none().then(|| "needs wg(8)".to_owned());
    if let Some(reason) = lab::unavailable().or(missing) {
        report_skipped(test, &reason);
        return None;
    }
    Some(Lab::new().unwrap())
}

fn key(number: u32) -> PublicKey {
    let mut bytes = [9; 32];
    bytes[..4].copy_from_slice(&number.to_be_bytes());
    PrivateKey::from_bytes(bytes).public_key()
}

/// Keys that are cheap to make; nobody shakes hands with their owners.
fn plain_key(number: u32) -> PublicKey {
    let mut bytes = [0x5a; 32];
    bytes[..4].copy_from_slice(&number.to_be_bytes());
    PublicKey::from_bytes(bytes)
}

fn preshared() -> String {
    PresharedKey::from_bytes([0x77; 32]).to_base64().to_string()
}

fn private(byte: u8) -> PrivateKey {
    PrivateKey::from_bytes([byte; 32])
}

/// Sends a request and reads what is answered until an empty line, or until the daemon hangs up.
fn ask(socket: &Path, request: &str) -> String {
    let mut stream = UnixStream::connect(socket).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(120))).unwrap();
    stream.write_all(request.as_bytes()).unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    let mut answer = String::new();
    // Who hangs up with words unread resets the connection.
    let _ = stream.read_to_string(&mut answer);
    answer
}

/// A file for wg(8) with peers of every kind.
fn motley(peer_count: u32) -> String {
    let mut conf = format!(
        "[Interface]\nPrivateKey = {}\nListenPort = 51833\nFwMark = 0x1f\n",
        private(3).to_base64().as_str()
    );
    for number in 0..peer_count {
        let ip = Ipv4Addr::from_bits(0x0a00_0000 + number);
        write!(conf, "\n[Peer]\nPublicKey = {}\n", plain_key(number)).unwrap();
        match number % 4 {
            0 => writeln!(conf, "AllowedIPs = {ip}/32").unwrap(),
            1 => writeln!(
                conf,
                "PresharedKey = {}\nAllowedIPs = {ip}/32, fd00::{number:x}/128\n\
                 Endpoint = 192.0.2.1:{}\nPersistentKeepalive = 25",
                preshared(),
                number % 60_000 + 1
            )
            .unwrap(),
            2 => writeln!(conf, "Endpoint = [2001:db8::{number:x}]:7").unwrap(),
            _ => writeln!(conf, "AllowedIPs = {ip}/32\nAllowedIPs = fd01:{number:x}::/64").unwrap(),
        }
    }
    conf
}

#[test]
fn every_word_of_wg_set_is_shown_by_every_word_of_wg_show() {
    let Some(lab) = lab("every_word_of_wg_set_is_shown_by_every_word_of_wg_show") else { return };
    let daemon = Daemon::start(&lab.gateway, &lab.interface('g'), UDP);
    let name = daemon.interface.as_str();
    let private_file = lab.write("key", private(3).to_base64().as_str()).unwrap();
    let preshared_file = lab.write("psk", &preshared()).unwrap();
    let [private_file, preshared_file] =
        [&private_file, &preshared_file].map(|f| f.to_str().unwrap());
    let [a, b] = [key(1), key(2)].map(|key| key.to_string());
    let set = |words: &str| {
        // As in a shell: who means nothing says so.
        let words = words.split_whitespace().map(|word| if word == "''" { "" } else { word });
        daemon.wg(&["set", name].into_iter().chain(words).collect::<Vec<_>>());
    };
    let show = |word: &str| daemon.wg(&["show", name, word]);

    set(&format!(
        "private-key {private_file} listen-port 51834 fwmark 0xca6c \
         peer {a} preshared-key {preshared_file} endpoint 192.0.2.7:70 persistent-keepalive 25 \
         allowed-ips 10.1.0.0/16,fd00::/64,10.2.3.4/16 \
         peer {b} endpoint [fd00::1]:71 allowed-ips 10.9.0.0/24"
    ));
    let own = private(3).public_key();
    for (word, expected) in [
        ("private-key", format!("{}\n", private(3).to_base64().as_str())),
        ("public-key", format!("{own}\n")),
        ("listen-port", "51834\n".to_owned()),
        ("fwmark", "0xca6c\n".to_owned()),
        ("peers", format!("{a}\n{b}\n")),
        ("preshared-keys", format!("{a}\t{}\n{b}\t(none)\n", preshared())),
        ("endpoints", format!("{a}\t192.0.2.7:70\n{b}\t[fd00::1]:71\n")),
        ("allowed-ips", format!("{a}\t10.1.0.0/16 fd00::/64 10.2.0.0/16\n{b}\t10.9.0.0/24\n")),
        ("latest-handshakes", format!("{a}\t0\n{b}\t0\n")),
        ("persistent-keepalive", format!("{a}\t25\n{b}\toff\n")),
    ] {
        assert_eq!(show(word), expected, "{word}");
    }
    // A peer with a keepalive is called at once, so that bytes were sent.
    let transfer = show("transfer");
    assert!(
        transfer.starts_with(&format!("{a}\t0\t")) && transfer.ends_with(&format!("{b}\t0\t0\n"))
    );
    let dump = show("dump");
    let lines: Vec<_> = dump.lines().collect();
    let private_text = private(3).to_base64();
    assert_eq!(lines[0], format!("{}\t{own}\t51834\t0xca6c", private_text.as_str()));
    let psk = preshared();
    assert!(lines[1].starts_with(&format!(
        "{a}\t{psk}\t192.0.2.7:70\t10.1.0.0/16,fd00::/64,10.2.0.0/16\t0\t0\t"
    )));
    assert_eq!(lines[2], format!("{b}\t(none)\t[fd00::1]:71\t10.9.0.0/24\t0\t0\t0\toff"));
    // Other interfaces of the host are shown, too; theirs may go meanwhile.
    let script = format!("wg show all dump | grep ^{name} || true");
    let all = lab.gateway.run("sh", &["-c", &script]).unwrap();
    let stripped: Vec<_> = all.lines().map(|line| line.split_once('\t').unwrap().1).collect();
    assert_eq!(stripped[0], lines[0]);
    assert_eq!(stripped[2], lines[2]);
    let names = lab.gateway.run("wg", &["show", "interfaces"]).unwrap();
    assert!(names.split_whitespace().any(|word| word == name), "{names}");
    let text = daemon.wg(&["show", name]);
    assert!(text.contains("peer: ") && !text.contains(private_text.as_str()), "{text}");

    // A prefix moves to whom it is given last; off, 0 and remove take away.
    set(&format!("peer {b} allowed-ips 10.1.0.0/16 peer {a} persistent-keepalive off"));
    assert_eq!(show("allowed-ips"), format!("{a}\tfd00::/64 10.2.0.0/16\n{b}\t10.1.0.0/16\n"));
    assert_eq!(show("persistent-keepalive"), format!("{a}\toff\n{b}\toff\n"));
    set(&format!("fwmark off peer {a} preshared-key /dev/null peer {b} allowed-ips ''"));
    set(&format!("listen-port 0 private-key /dev/null peer {b} remove"));
    assert_eq!(show("fwmark"), "off\n");
    assert_eq!(show("preshared-keys"), format!("{a}\t(none)\n"));
    assert_eq!(show("private-key"), "(none)\n");
    assert_ne!(show("listen-port"), "0\n");

    // What a newer wg(8) says for `allowed-ips -…`, and `update_only`, which wg(8) has no word for.
    let path = socket(name);
    let request = format!(
        "set=1\npublic_key={}\nallowed_ip=-10.2.0.0/16\nallowed_ip=10.3.0.0/16\n\
         public_key={}\nupdate_only=true\nallowed_ip=10.4.0.0/16\n\n",
        key(1).to_hex(),
        key(2).to_hex()
    );
    assert_eq!(ask(&path, &request), "errno=0\n\n");
    assert_eq!(show("allowed-ips"), format!("{a}\tfd00::/64 10.3.0.0/16\n"));
}

#[test]
fn what_showconf_says_is_what_setconf_takes() {
    let Some(lab) = lab("what_showconf_says_is_what_setconf_takes") else { return };
    let daemon = Daemon::start(&lab.gateway, &lab.interface('g'), UDP);
    let name = daemon.interface.as_str();
    let file = lab.write("motley.conf", &motley(200)).unwrap();
    daemon.wg(&["setconf", name, file.to_str().unwrap()]);
    // What was sent is no part of a configuration.
    let configured = || -> Vec<String> {
        let dump = daemon.dump().into_iter();
        dump.map(|fields| {
            let fields = fields
                .iter()
                .enumerate()
                .filter(|&(n, _)| fields.len() == 4 || !(4..=6).contains(&n));
            fields.map(|(_, field)| field.as_str()).collect::<Vec<_>>().join("\t")
        })
        .collect()
    };
    let before = configured();
    assert_eq!(before.len(), 201);
    let first = daemon.wg(&["showconf", name]);
    for verb in ["setconf", "syncconf", "addconf", "setconf"] {
        let shown = lab.write("shown.conf", &first).unwrap();
        daemon.wg(&[verb, name, shown.to_str().unwrap()]);
        assert_eq!(configured(), before, "{verb}");
        assert_eq!(daemon.wg(&["showconf", name]), first, "{verb}: byte for byte");
    }
    // Through a pipe, as people write it.
    let script = format!("wg showconf {name} | wg setconf {name} /dev/stdin");
    lab.gateway.run("sh", &["-c", &script]).unwrap();
    assert_eq!(daemon.wg(&["showconf", name]), first);
}

#[test]
fn names_of_peers_are_answered_and_wg_does_not_mind_them() {
    let Some(lab) = lab("names_of_peers_are_answered_and_wg_does_not_mind_them") else { return };
    let daemon = Daemon::start(&lab.gateway, &lab.interface('g'), UDP);
    let name = daemon.interface.as_str();
    let path = socket(name);
    let file = lab.write("motley.conf", &motley(20)).unwrap();
    daemon.wg(&["setconf", name, file.to_str().unwrap()]);
    let words = || {
        [&[][..], &["dump"], &["peers"], &["allowed-ips"], &["endpoints"], &["preshared-keys"]]
            .map(|what| daemon.wg(&[&["show", name], what].concat()))
    };
    let (shown, conf) = (words(), daemon.wg(&["showconf", name]));
    let longest = "\u{1f4bb}".repeat(63);
    let names = ["laptop", "errno=1", "public key = x, \\ \"y\"", &longest];
    let named: String = (1..).zip(names).fold(String::new(), |text, (number, name)| {
        text + &format!(
            "public_key={}\nupdate_only=true\ntidegate_name={name}\n",
            plain_key(number).to_hex()
        )
    });
    assert_eq!(ask(&path, &format!("set=1\n{named}\n")), "errno=0\n\n");
    let answered = || -> Vec<String> {
        let answer = ask(&path, "get=1\n\n");
        let names = answer.lines().filter_map(|line| line.strip_prefix("tidegate_name="));
        names.map(str::to_owned).collect()
    };
    assert_eq!(answered(), names);
    assert_eq!((words(), daemon.wg(&["showconf", name])), (shown, conf.clone()));
    // wg(8) knows no names: what it sets of a peer that stays leaves its name.
    let conf = lab.write("shown.conf", &conf).unwrap();
    daemon.wg(&["syncconf", name, conf.to_str().unwrap()]);
    daemon.wg(&["set", name, "peer", &plain_key(1).to_string(), "persistent-keepalive", "3"]);
    assert_eq!(answered(), names);
    for wrong in [" a", "a\t", "a#b", &plain_key(1).to_string(), &"x".repeat(64)] {
        let request =
            format!("set=1\npublic_key={}\ntidegate_name={wrong}\n\n", plain_key(1).to_hex());
        assert_eq!(ask(&path, &request), "errno=-22\n\n", "{wrong}");
    }
    let request = format!("set=1\npublic_key={}\ntidegate_name=\n\n", plain_key(1).to_hex());
    assert_eq!(ask(&path, &request), "errno=0\n\n");
    assert_eq!(answered(), names[1..]);
}

#[test]
fn ten_thousand_peers_come_by_setconf() {
    let Some(lab) = lab("ten_thousand_peers_come_by_setconf") else { return };
    let daemon = Daemon::start(&lab.gateway, &lab.interface('g'), UDP);
    let file = lab.write("many.conf", &motley(10_000)).unwrap();
    let start = Instant::now();
    daemon.wg(&["setconf", &daemon.interface, file.to_str().unwrap()]);
    let set = start.elapsed();
    let count = daemon.dump().len();
    eprintln!("10,000 peers: wg setconf {set:?}, wg show dump {:?}", start.elapsed() - set);
    assert_eq!(count, 10_001);
    daemon.wg(&["syncconf", &daemon.interface, file.to_str().unwrap()]);
    assert_eq!(daemon.dump().len(), 10_001);
}

/// Resident memory does not grow by more than this for an idle peer with one allowed IP.
const PEER_BYTES_MAX: u64 = 1024;

#[test]
fn many_peers_take_little_memory_and_give_it_back() {
    const COUNT: u32 = 20_000;
    const CHOSEN: u32 = 12_345;
    let Some(lab) = lab("many_peers_take_little_memory_and_give_it_back") else { return };
    let daemon = Daemon::start(&lab.gateway, &lab.interface('g'), UDP);
    let (name, pid) = (daemon.interface.as_str(), daemon.process.pid());
    let device = format!("[Interface]\nPrivateKey = {}\n", private(3).to_base64().as_str());
    let address = |number: u32| Ipv4Addr::from_bits(0x0a00_0001 + number);
    let mut many = device.clone();
    for number in 0..COUNT {
        let (key, ip) = (plain_key(number), address(number));
        write!(many, "[Peer]\nPublicKey = {key}\nAllowedIPs = {ip}/32\n").unwrap();
    }
    let [none, many] = [("none.conf", &device), ("many.conf", &many)]
        .map(|(file, text)| lab.write(file, text).unwrap());
    let set = |file: &Path| daemon.wg(&["setconf", name, file.to_str().unwrap()]);
    set(&none);
    daemon.space.configure(name, "Address = 10.0.0.0/8\n").unwrap();
    let before = resident_kib(pid);
    set(&many);
    let with_all = resident_kib(pid);
    let bytes_each = with_all.saturating_sub(before) * 1024 / u64::from(COUNT);
    eprintln!("{COUNT} peers: {before} KiB before, {with_all} KiB after, {bytes_each} bytes each");
    assert!(bytes_each <= PEER_BYTES_MAX, "{bytes_each} bytes for each peer");

    let dump = daemon.dump();
    let shown = dump[1..].iter().map(|peer| (peer[0].clone(), peer[3].clone()));
    let expected = (0..COUNT).map(|n| (plain_key(n).to_string(), format!("{}/32", address(n))));
    assert!(shown.eq(expected), "every peer is shown, in its place, with its own prefix");

    // What goes to one of them has us reach for that one, and nobody else.
    let chosen = plain_key(CHOSEN).to_string();
    daemon.wg(&["set", name, "peer", &chosen, "endpoint", "198.51.100.2:4444"]);
    let ping = lab.gateway.ping(&address(CHOSEN).to_string(), 1, &[]).unwrap();
    assert_eq!(ping.answered, 0, "nobody is there");
    let sent: Vec<_> = daemon.dump().into_iter().skip(1).filter(|peer| peer[6] != "0").collect();
    assert_eq!(sent.len(), 1, "{sent:?}");
    assert_eq!(sent[0][0], chosen);

    set(&none);
    assert_eq!(daemon.dump().len(), 1);
    let left = resident_kib(pid).saturating_sub(before);
    eprintln!("{left} KiB are left");
    assert!(left <= (with_all - before) / 3, "{left} KiB are left of {}", with_all - before);
}

/// Echo requests from the client through the tunnel while `work` is done; none may be lost.
fn without_loss(lab: &Lab, work: impl FnOnce()) {
    thread::scope(|scope| {
        let ping = scope.spawn(|| lab.client.ping(GATEWAY_INNER[0], 100, &["-i", "0.03"]).unwrap());
        work();
        let ping = ping.join().unwrap();
        assert_eq!((ping.sent, ping.answered), (100, 100));
    });
}

#[test]
fn a_session_is_not_disturbed_by_an_equal_file_or_by_another_peer() {
    const TEST: &str = "a_session_is_not_disturbed_by_an_equal_file_or_by_another_peer";
    let Some(lab) = lab(TEST) else { return };
    let mut conf = GATEWAY_CONF.to_owned();
    for number in 1..100 {
        let ip = Ipv4Addr::from_bits(0x0a0a_0000 + number);
        write!(
            conf,
            "\n[Peer]\nPublicKey = {}\nAllowedIPs = {ip}/32\nEndpoint = 192.0.2.1:{number}\n",
            key(number)
        )
        .unwrap();
    }
    let gateway = Daemon::start(&lab.gateway, &lab.interface('g'), UDP);
    gateway.wg(&["show", &gateway.interface]);
    let keys = |conf: &str| -> String {
        let lines = conf.lines().filter(|line| !line.starts_with("Address"));
        lines.fold(String::new(), |text, line| text + line + "\n")
    };
    let write = |conf: &str| lab.write("gateway.set", &keys(conf)).unwrap();
    gateway.wg(&["setconf", &gateway.interface, write(&conf).to_str().unwrap()]);
    gateway.space.configure(&gateway.interface, GATEWAY_CONF).unwrap();
    let client = Daemon::start(&lab.client, &lab.interface('c'), UDP);
    client.configure(&lab, CLIENT_CONF);
    common::assert_answered(&lab.client, &[GATEWAY_INNER[0]]);

    let handshake = || gateway.dump()[1][4].clone();
    let before = handshake();
    assert_ne!(before, "0");
    without_loss(&lab, || {
        for _ in 0..5 {
            for verb in ["syncconf", "addconf"] {
                gateway.wg(&[verb, &gateway.interface, write(&conf).to_str().unwrap()]);
            }
        }
    });
    let changed = conf.replace("10.10.0.7/32", "10.11.0.7/32");
    assert_ne!(changed, conf);
    without_loss(&lab, || {
        for conf in [&changed, &conf, &changed] {
            gateway.wg(&["syncconf", &gateway.interface, write(conf).to_str().unwrap()]);
        }
    });
    // A peer that goes and one that comes disturb nobody either.
    let without = conf.replace(&key(7).to_string(), &key(700).to_string());
    without_loss(&lab, || {
        gateway.wg(&["syncconf", &gateway.interface, write(&without).to_str().unwrap()]);
    });
    assert_eq!(handshake(), before, "there was no other handshake");
    let peers = gateway.wg(&["show", &gateway.interface, "peers"]);
    assert!(peers.contains(&key(700).to_string()) && !peers.contains(&key(7).to_string()));
    assert_eq!(peers.lines().count(), 100);
}

/// The processes of a daemon: its own and those that it started.
fn processes(pid: u32) -> Vec<u32> {
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
    let children = children.split_whitespace().flat_map(|child| processes(child.parse().unwrap()));
    [pid].into_iter().chain(children).collect()
}

fn fd_count(pid: u32) -> usize {
    let count = |pid: u32| fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count();
    processes(pid).into_iter().map(count).sum()
}

fn resident_kib(pid: u32) -> u64 {
    let of = |pid: u32| {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap().trim();
        line.split(' ').next().unwrap().parse::<u64>().unwrap()
    };
    processes(pid).into_iter().map(of).sum()
}

#[test]
fn clients_that_stall_or_vanish_lock_nobody_out_and_leave_nothing() {
    const TEST: &str = "clients_that_stall_or_vanish_lock_nobody_out_and_leave_nothing";
    let Some(lab) = lab(TEST) else { return };
    let daemon = Daemon::start(&lab.gateway, &lab.interface('g'), UDP);
    let name = daemon.interface.as_str();
    let file = lab.write("many.conf", &motley(5_000)).unwrap();
    daemon.wg(&["setconf", name, file.to_str().unwrap()]);
    let (path, pid) = (socket(name), daemon.process.pid());
    let connect = || UnixStream::connect(&path).unwrap();
    let peer = format!("public_key={}\nallowed_ip=10.0.0.0/8\n", key(1).to_hex());
    let vanish = || {
        for request in [
            String::new(),
            "get=1\n\n".to_owned(),
            "get=1\n".to_owned(),
            format!("set=1\n{peer}"),
            "\0\u{1}garbage\n\n".to_owned(),
            "x".repeat(100_000),
            format!("set=1\n{}", peer.repeat(5_000)),
            "tidegate=quiesce\nsecond".to_owned(),
        ] {
            // It may hang up before it has heard all.
            let _ = connect().write_all(request.as_bytes());
        }
    };
    let settled = |expected: usize| {
        let mut last = 0;
        let what = format!("{expected} descriptors");
        lab::wait_for(&what, LIMIT, || {
            last = fd_count(pid);
            Ok((last <= expected).then_some(()))
        })
        .unwrap_or_else(|error| panic!("{error:#}, but {last}"));
    };
    daemon.wg(&["show", name, "dump"]);
    let before = fd_count(pid);
    (0..20).for_each(|_| vanish());
    settled(before);
    let resident = resident_kib(pid);
    (0..100).for_each(|_| vanish());
    settled(before);
    let grown_kib = resident_kib(pid).saturating_sub(resident);
    assert!(grown_kib < 16 << 10, "{grown_kib} KiB more after 800 clients");

    // Far more than there is room for, each of which holds on and neither reads nor goes on.
    let stalled: Vec<_> = (0..200)
        .map(|number| {
            let mut stream = connect();
            let words: &[u8] = match number % 4 {
                0 => b"",
                1 => b"get=1\n\nget=1\n\nget=1\n\n",
                2 => b"set=1\nlisten_port=1\n",
                _ => b"se",
            };
            let _ = stream.write_all(words);
            if number % 20 == 0 {
                assert_eq!(daemon.wg(&["show", name, "listen-port"]), "51833\n");
            }
            stream
        })
        .collect();
    assert_eq!(daemon.dump().len(), 5_001);
    assert!(fd_count(pid) <= before + 64, "most were let go");
    drop(stalled);
    settled(before);
    assert_eq!(daemon.wg(&["show", name, "listen-port"]), "51833\n");

    // Byte by byte, but right.
    let mut slow = connect();
    for byte in b"set=1\nlisten_port=51835\n\n" {
        slow.write_all(&[*byte]).unwrap();
    }
    slow.read_exact(&mut [0; 9]).unwrap();
    assert_eq!(daemon.wg(&["show", name, "listen-port"]), "51835\n");
}

#[test]
fn who_removes_the_socket_ends_the_daemon() {
    let Some(lab) = lab("who_removes_the_socket_ends_the_daemon") else { return };
    let daemon = Daemon::start(&lab.gateway, &lab.interface('g'), UDP);
    fs::remove_file(socket(&daemon.interface)).unwrap();
    daemon.ends_cleanly();
}

#[test]
fn errors_have_the_numbers_that_wireguard_go_gives_them() {
    const TEST: &str = "errors_have_the_numbers_that_wireguard_go_gives_them";
    let Some(lab) = lab(TEST) else { return };
    if find_program("wireguard-go").is_none() {
        return report_skipped(TEST, "needs wireguard-go");
    }
    let ours = Daemon::start(&lab.gateway, &lab.interface('g'), UDP);
    let theirs = lab.interface('w');
    let mut command = lab.client.command("wireguard-go");
    command.args(["-f", &theirs]).env("LOG_LEVEL", "silent");
    let mut process = lab.client.spawn("wireguard-go", &mut command).unwrap();
    let path = socket(&theirs);
    lab::wait_for("wireguard-go's socket", LIMIT, || {
        anyhow::ensure!(process.ended()?.is_none(), "it ended: {}", process.errors());
        Ok(UnixStream::connect(&path).ok())
    })
    .unwrap();
    // In both namespaces somebody has this port.
    let taken = |space: &lab::Space| {
        let script = "import socket, time\ns = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n\
                      s.bind(('', 7777))\nprint('bound', flush=True)\ntime.sleep(600)";
        let mut python = space.command("python3");
        space.spawn("python3", python.args(["-c", script])).ok()
    };
    let holders = [&lab.gateway, &lab.client].map(taken);
    let is_taken = holders.iter().flatten().all(|holder| {
        lab::wait_for("a port", LIMIT, || Ok((holder.output() == "bound\n").then_some(()))).is_ok()
    }) && find_program("python3").is_some();

    let (hex, zero) = (key(1).to_hex(), "0".repeat(64));
    let peer = |line: &str| format!("public_key={hex}\n{line}");
    let mut lines: Vec<String> = [
        "private_key=",
        "private_key=00",
        "private_key=zz",
        "listen_port=",
        "listen_port=-1",
        "listen_port=+1",
        "listen_port=65536",
        "listen_port=x",
        "listen_port=00",
        "fwmark=",
        "fwmark=0x1",
        "fwmark=4294967296",
        "fwmark=-1",
        "fwmark=7",
        "fwmark=0",
        "replace_peers=false",
        "replace_peers=",
        "replace_peers=true",
        "nonsense",
        "nonsense=1",
        "=",
        "=1",
        "public_key=",
        "public_key=00",
        "update_only=true",
        "remove=true",
        "endpoint=1.2.3.4:5",
        "allowed_ip=10.0.0.0/8",
        "protocol_version=1",
        "errno=0",
        "get=1",
        " listen_port=1",
        "listen_port =1",
        "listen_port= 1",
        "listen_port=1 ",
        "LISTEN_PORT=1",
        "set=1",
    ]
    .map(str::to_owned)
    .to_vec();
    lines.push(format!("private_key={zero}"));
    lines.push(format!("private_key={}", "AB".repeat(32)));
    lines.push(format!("private_key={}", "ab".repeat(33)));
    lines.extend(
        [
            "",
            "remove=true",
            "remove=false",
            "remove=",
            "update_only=true",
            "update_only=1",
            "preshared_key=",
            "preshared_key=00",
            "preshared_key=xyz",
            "endpoint=",
            "endpoint=1.2.3.4",
            "endpoint=1.2.3.4:",
            "endpoint=1.2.3.4:65536",
            "endpoint=1.2.3.4:5",
            "endpoint=[fd00::1]:5",
            "endpoint=fd00::1:5",
            "endpoint=example.org:5",
            "persistent_keepalive_interval=",
            "persistent_keepalive_interval=0",
            "persistent_keepalive_interval=65535",
            "persistent_keepalive_interval=65536",
            "persistent_keepalive_interval=off",
            "persistent_keepalive_interval=-1",
            "replace_allowed_ips=true",
            "replace_allowed_ips=false",
            "replace_allowed_ips=",
            "allowed_ip=",
            "allowed_ip=10.0.0.0",
            "allowed_ip=10.0.0.0/8",
            "allowed_ip=10.0.0.1/8",
            "allowed_ip=10.0.0.0/33",
            "allowed_ip=fd00::/64",
            "allowed_ip=fd00::/129",
            "allowed_ip=10.0.0.0/-1",
            "allowed_ip=0.0.0.0/0",
            "allowed_ip=::/0",
            "allowed_ip=x/8",
            "protocol_version=1",
            "protocol_version=2",
            "protocol_version=",
            "listen_port=1",
            "fwmark=1",
            "replace_peers=true",
            "private_key=00",
            "nonsense",
            "nonsense=1",
            "=",
            "rx_bytes=1",
            "tx_bytes=1",
            "last_handshake_time_sec=1",
        ]
        .map(peer),
    );
    if is_taken {
        lines.push("listen_port=7777".to_owned());
    }
    let own_path = socket(&ours.interface);
    let mut differ = Vec::new();
    let mut numbers = std::collections::BTreeSet::new();
    for line in &lines {
        let request = format!("set=1\n{line}\n\n");
        let errno = |path: &Path| ask(path, &request).lines().next().unwrap_or_default().to_owned();
        let (our, their) = (errno(&own_path), errno(&path));
        numbers.insert(our.clone());
        if our != their {
            differ.push(format!("{line:?}: {our}, wireguard-go {their}"));
        }
    }
    assert_eq!(differ, [] as [&str; 0]);
    let expected = ["errno=-22", "errno=-71", "errno=0"];
    assert!(expected.iter().all(|&number| numbers.contains(number)), "{numbers:?}");
    assert_eq!(numbers.contains("errno=-98"), is_taken);

    // What it does differently on purpose: nothing of a request is done if a part of it is wrong. And
    // what is no request is answered, where wireguard-go hangs up.
    for path in [&own_path, &path] {
        assert_eq!(ask(path, "set=1\nfwmark=0\n\n"), "errno=0\n\n");
        assert_eq!(ask(path, "set=1\nfwmark=77\nnonsense=1\n\n"), "errno=-22\n\n");
    }
    assert!(!ask(&own_path, "get=1\n\n").contains("fwmark"));
    assert!(ask(&path, "get=1\n\n").contains("fwmark=77\n"));
    assert_eq!(ask(&own_path, "get=2\n\n"), "errno=-71\n\n");
    assert_eq!(ask(&path, "get=2\n\n"), "");
}

/// How long a million peers take, and how long the control thread looks at nothing else. Run it with
/// `cargo test --release -p wg-userspace --test wg_tools -- --ignored --nocapture a_million`;
/// `PEER_COUNT` makes them fewer.
#[test]
#[ignore = "takes minutes and gigabytes; it measures"]
fn a_million_peers_are_set_and_shown() {
    let peer_count = std::env::var("PEER_COUNT").map_or(1_000_000, |count| count.parse().unwrap());
    let Some(lab) = lab("a_million_peers_are_set_and_shown") else { return };
    let options = [UDP, &["--log", "warn,wg_userspace::daemon=debug"]].concat();
    let daemon = Daemon::start(&lab.gateway, &lab.interface('g'), &options);
    let pid = daemon.process.pid();
    let told = |since: &mut usize| {
        let log = daemon.process.errors();
        let new = log[*since..].lines().filter(|line| line.contains("was busy")).map(str::to_owned);
        let new: Vec<_> = new.collect();
        *since = log.len();
        new
    };
    let mut request =
        format!("set=1\nprivate_key={}\nreplace_peers=true\n", private(3).to_hex().as_str());
    for number in 0..peer_count {
        let ip = Ipv4Addr::from_bits(0x0a00_0000 + number);
        let key = plain_key(number).to_hex();
        write!(request, "public_key={key}\nreplace_allowed_ips=true\nallowed_ip={ip}/32\n")
            .unwrap();
    }
    request.push('\n');
    let (path, mut log_len) = (socket(&daemon.interface), 0);
    let idle_kib = resident_kib(pid);
    for what in ["a first set", "replaced by the same", "get", "remove all"] {
        let request = match what {
            "get" => "get=1\n\n",
            "remove all" => "set=1\nreplace_peers=true\n\n",
            _ => &request,
        };
        let (before_kib, start) = (resident_kib(pid), Instant::now());
        let mut stream = UnixStream::connect(&path).unwrap();
        stream.write_all(request.as_bytes()).unwrap();
        let sent = start.elapsed();
        let mut answer_len = 0;
        let mut tail = Vec::new();
        let mut part = vec![0; 1 << 16];
        while !tail.ends_with(b"\n\n") {
            let len = stream.read(&mut part).unwrap();
            assert!(len > 0);
            answer_len += len;
            tail.extend_from_slice(&part[..len]);
            tail.drain(..tail.len().saturating_sub(16));
        }
        assert!(tail.ends_with(b"errno=0\n\n"));
        eprintln!(
            "{what}: sent within {sent:.1?}, done after {:.1?}, {answer_len} bytes answered; \
             resident {} MiB before, {} MiB after (idle: {}); looks that were late: {:?}",
            start.elapsed(),
            before_kib >> 10,
            resident_kib(pid) >> 10,
            idle_kib >> 10,
            told(&mut log_len)
        );
    }
}
