//! A [`Report`](super::Report) as text: word for word what `wg show` prints, and with it names, the data
//! path, and what is wrong.

use std::fmt;

use super::report::{DataPath, Interface, Nic, Peer, Steering};
use super::troubles::{Trouble, why_dropped};
use crate::sandbox;

/// Colours, or none.
#[derive(Clone, Copy, Debug)]
pub struct Paint {
    /// Whether to colour.
    pub is_on: bool,
}

const RESET: &str = "\x1b[0m";
const BOLD: &str = "\x1b[1m";
const RED: &str = "\x1b[31m";
const GREEN: &str = "\x1b[32m";
const YELLOW: &str = "\x1b[33m";
const CYAN: &str = "\x1b[36m";

impl Paint {
    fn on(self, codes: &str, text: &str) -> String {
        if self.is_on { format!("{codes}{text}{RESET}") } else { text.to_owned() }
    }

    /// A word that names what follows.
    pub fn bold(self, word: &str) -> String {
        self.on(BOLD, word)
    }

    /// `interface: wg0` and `peer: KEY`.
    fn heading(self, colour: &str, word: &str, name: &str) -> String {
        let word = self.on(&format!("{colour}{BOLD}"), word);
        format!("{word}: {}\n", self.on(colour, name))
    }

    fn trouble(self, trouble: &Trouble) -> String {
        let word = self.on(&format!("{RED}{BOLD}"), "trouble");
        format!("  {word}: {}\n", trouble.text)
    }

    fn line(self, word: &str, value: &str) -> String {
        format!("  {}: {value}\n", self.on(BOLD, word))
    }
}

/// One interface. `now_unix_s` is the time of the clock on the wall.
pub fn interface(interface: &Interface, paint: Paint, now_unix_s: u64) -> String {
    let mut text = String::new();
    if paint.is_on {
        text.push_str(RESET);
    }
    text += &paint.heading(GREEN, "interface", &interface.name);
    if let Some(public_key) = &interface.public_key {
        text += &paint.line("public key", &public_key.0.to_string());
        let private_key = interface.private_key.as_ref().map_or("(hidden)", |key| key.expose());
        text += &paint.line("private key", private_key);
    }
    if interface.listen_port != 0 {
        text += &paint.line("listening port", &interface.listen_port.to_string());
    }
    if interface.fwmark != 0 {
        text += &paint.line("fwmark", &format!("{:#x}", interface.fwmark));
    }
    if let Some(path) = &interface.data_path {
        text += &data_path(path, paint);
    }
    for trouble in &interface.troubles {
        text += &paint.trouble(trouble);
    }
    if interface.more_troubles != 0 {
        let more = plural(interface.more_troubles as u64, "more trouble");
        text += &paint.line("not listed", &format!("{more} with peers"));
    }
    for each in &interface.peers {
        text.push('\n');
        text += &peer(each, paint, now_unix_s);
    }
    text
}

fn peer(peer: &Peer, paint: Paint, now_unix_s: u64) -> String {
    let mut text = paint.heading(YELLOW, "peer", &peer.public_key.0.to_string());
    if let Some(name) = &peer.name {
        text += &paint.line("name", name);
    }
    if peer.has_preshared_key {
        let preshared_key = peer.preshared_key.as_ref().map_or("(hidden)", |key| key.expose());
        text += &paint.line("preshared key", preshared_key);
    }
    if let Some(endpoint) = &peer.endpoint {
        text += &paint.line("endpoint", endpoint);
    }
    let slash = paint.on(CYAN, "/");
    let allowed_ips: Vec<String> =
        peer.allowed_ips.iter().map(|prefix| prefix.replacen('/', &slash, 1)).collect();
    let allowed_ips =
        if allowed_ips.is_empty() { "(none)".to_owned() } else { allowed_ips.join(", ") };
    text += &paint.line("allowed ips", &allowed_ips);
    if let Some(then) = peer.latest_handshake_unix_s {
        text += &paint.line("latest handshake", &ago(then, paint, now_unix_s));
    }
    if peer.rx_bytes != 0 || peer.tx_bytes != 0 {
        let rx = bytes(peer.rx_bytes, paint);
        let tx = bytes(peer.tx_bytes, paint);
        text += &paint.line("transfer", &format!("{rx} received, {tx} sent"));
    }
    if let Some(interval) = peer.persistent_keepalive_s {
        let every = format!("every {}", duration(interval.into(), paint));
        text += &paint.line("persistent keepalive", &every);
    }
    for trouble in &peer.troubles {
        text += &paint.trouble(trouble);
    }
    text
}

fn data_path(path: &DataPath, paint: Paint) -> String {
    let mut text = paint.line("data path", &path.to_string());
    // Who does not say how they receive says it in the line above.
    for nic in path.nics.iter().filter(|nic| !nic.receive.is_empty()) {
        let Nic { name, receive, transmit, reason, .. } = nic;
        text += &paint
            .line("nic", &format!("{name}, receive {receive}, transmit {transmit}: {reason}"));
    }
    // One worker gets everything.
    for (word, it) in
        [("tun steering", &path.tun_steering), ("socket steering", &path.socket_steering)]
    {
        if let Some(it) = it.as_ref().filter(|_| path.workers > 1) {
            text += &paint.line(word, &steering(it));
        }
    }
    if path.handed_on != 0 {
        text += &paint.line("handed on to other workers", &path.handed_on.to_string());
    }
    if path.fanned_out != 0 {
        text += &paint.line("batches that other workers did", &path.fanned_out.to_string());
    }
    // What is usual is not worth a line.
    if path.mss_clamp == Some(false) {
        text += &paint.line("mss clamp", "off");
    }
    if path.copy_dscp == Some(true) {
        text += &paint.line("copy dscp", "on");
    }
    if let Some(held) = &path.privileges {
        text += &paint.line("privileges", &privileges(held));
    }
    if let Some(quiesced) = &path.quiesced {
        let until = match quiesced.seconds_left {
            None => "until it is resumed".to_owned(),
            Some(seconds) => format!("for {}", duration(seconds, paint)),
        };
        text += &paint.line("quiesced", &until);
    }
    for (word, counters) in [
        ("received by", &path.paths),
        ("sent by", &path.sent),
        ("steer", &path.steer),
        ("drops", &path.drops),
        ("sessions cleared", &path.sessions_cleared),
    ] {
        let counted: Vec<String> = counters
            .iter()
            .filter(|&(_, &count)| count != 0)
            .map(|(name, count)| format!("{name} {count}"))
            .collect();
        if !counted.is_empty() {
            text += &paint.line(word, &counted.join(", "));
        }
        if word == "drops" {
            text += &explanations(path);
        }
    }
    text
}

/// What reasons of drops mean, a line each.
fn explanations(path: &DataPath) -> String {
    let mut reasons: Vec<&str> = Vec::new();
    for (name, _) in path.steer.iter().chain(&path.drops).filter(|&(_, &count)| count != 0) {
        if !reasons.contains(&name.as_str()) {
            reasons.push(name);
        }
    }
    let explained = reasons.into_iter().filter_map(|name| Some((name, why_dropped(name)?)));
    explained.map(|(name, why)| format!("    {name}: {why}\n")).collect()
}

/// Whether packets come to the worker of their peer, and why not.
fn steering(steering: &Steering) -> String {
    let word = if steering.is_on { "on" } else { "off" };
    match &steering.reason {
        None => word.to_owned(),
        Some(reason) => format!("{word}: {reason}"),
    }
}

/// What the process that opens packets may still do.
fn privileges(held: &sandbox::Report) -> String {
    let capabilities = match held.capabilities.permitted {
        0 => "no capabilities".to_owned(),
        some => format!("capabilities {some:#x}"),
    };
    let mut words = vec![format!("uid {}", held.uid), capabilities];
    if held.no_new_privs {
        words.push("no new privileges".to_owned());
    }
    if held.seccomp == sandbox::Seccomp::Filter {
        words.push("seccomp".to_owned());
    }
    match held.landlock {
        sandbox::Landlock::Full => words.push("landlock".to_owned()),
        sandbox::Landlock::Partial => words.push("landlock (in part)".to_owned()),
        sandbox::Landlock::None => {}
    }
    words.join(", ")
}

/// The mode, where and why, in some words.
impl fmt::Display for DataPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.mode)?;
        for nic in self.nics.iter().filter(|nic| nic.queues > 0) {
            let copy = if nic.zero_copy { "zero-copy" } else { "copy" };
            write!(f, ", {} ({}, {copy})", nic.name, plural(nic.queues.into(), "queue"))?;
        }
        write!(f, ", {}", plural(self.workers as u64, "worker"))?;
        if self.stuck_workers != 0 {
            write!(f, " ({} stuck)", self.stuck_workers)?;
        }
        if self.under_load {
            f.write_str(", under load")?;
        }
        match self.reason.as_deref() {
            None | Some("") => Ok(()),
            Some(reason) => write!(f, ": {reason}"),
        }
    }
}

/// `2 minutes, 1 second ago`.
pub fn ago(then: u64, paint: Paint, now: u64) -> String {
    match now.checked_sub(then) {
        Some(0) => "Now".to_owned(),
        Some(age) => format!("{} ago", duration(age, paint)),
        None => {
            let warning = "System clock wound backward; connection problems may ensue.";
            format!("({})", paint.on(RED, warning))
        }
    }
}

/// `1 hour, 1 minute, 40 seconds`.
pub fn duration(mut seconds: u64, paint: Paint) -> String {
    const UNITS: [(&str, u64); 5] = [
        ("year", 365 * 24 * 60 * 60),
        ("day", 24 * 60 * 60),
        ("hour", 60 * 60),
        ("minute", 60),
        ("second", 1),
    ];
    let mut parts = Vec::new();
    for (unit, len) in UNITS {
        let count = seconds / len;
        seconds %= len;
        if count != 0 {
            let unit = if count == 1 { unit.to_owned() } else { format!("{unit}s") };
            parts.push(format!("{count} {}", paint.on(CYAN, &unit)));
        }
    }
    parts.join(", ")
}

/// `5.00 GiB`.
pub fn bytes(count: u64, paint: Paint) -> String {
    const UNITS: [&str; 4] = ["KiB", "MiB", "GiB", "TiB"];
    if count < 1024 {
        return format!("{count} {}", paint.on(CYAN, "B"));
    }
    let mut scaled = count as f64 / 1024.0;
    let mut unit = 0;
    while scaled >= 1024.0 && unit + 1 < UNITS.len() {
        scaled /= 1024.0;
        unit += 1;
    }
    format!("{scaled:.2} {}", paint.on(CYAN, UNITS[unit]))
}

/// `1 peer`, `2 peers`.
pub fn plural(count: u64, word: &str) -> String {
    if count == 1 { format!("1 {word}") } else { format!("{count} {word}s") }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: Paint = Paint { is_on: false };

    #[test]
    fn time_and_size_read_well() {
        assert_eq!(ago(100, PLAIN, 100), "Now");
        assert_eq!(ago(100, PLAIN, 101), "1 second ago");
        assert_eq!(ago(0, PLAIN, 2 * 365 * 86_400 + 3601), "2 years, 1 hour, 1 second ago");
        assert!(ago(101, PLAIN, 100).starts_with("(System clock wound backward"));
        assert_eq!(bytes(1023, PLAIN), "1023 B");
        assert_eq!(bytes(1 << 10, PLAIN), "1.00 KiB");
        assert_eq!(bytes((1 << 20) - 1, PLAIN), "1024.00 KiB");
        assert_eq!(bytes(u64::MAX, PLAIN), "16777216.00 TiB");
    }

    #[test]
    fn the_data_path_stands_between_interface_and_peers() {
        let json = r#"{"mode":"native","reason":null,"workers":2,"stuck_workers":1,"under_load":true,
            "nics":[{"name":"eth0","queues":4,"zero_copy":true,"receive":"zero-copy","transmit":"zero-copy",
                     "reason":"why"},{"name":"eth1","queues":1},{"name":"eth2","queues":0}],
            "drops":{"bad_tag":1,"replay":3,"queue_full":0},"steer":{"steered":7},
            "paths":{"xsk":12,"socket":0},"sent":{"xsk":1,"socket":8}}"#;
        let device = Interface {
            name: "wg0".to_owned(),
            listen_port: 51820,
            data_path: Some(serde_json::from_str(json).unwrap()),
            ..Interface::default()
        };
        assert_eq!(
            interface(&device, PLAIN, 0),
            "interface: wg0\n  listening port: 51820\n  data path: native, eth0 (4 queues, zero-copy), \
             eth1 (1 queue, copy), 2 workers (1 stuck), under load\n  \
             nic: eth0, receive zero-copy, transmit zero-copy: why\n  \
             received by: xsk 12\n  sent by: socket 8, xsk 1\n  steer: steered 7\n  drops: bad_tag 1, replay 3\n    \
             bad_tag: altered on their way, or sealed with a key of another session\n    \
             replay: came twice, or very late\n"
        );
    }

    #[test]
    fn privileges_are_shown_in_a_line() {
        let none = r#"{"effective":0,"permitted":0,"inheritable":0,"ambient":0,"bounding":0}"#;
        let show = |sets: &str, rest: &str| {
            let held = format!(r#"{{"uid":65534,"gid":65534,"capabilities":{sets},{rest}}}"#);
            privileges(&serde_json::from_str(&held).unwrap())
        };
        let all = r#""no_new_privs":true,"dumpable":false,"seccomp":"filter","landlock":"full""#;
        assert_eq!(
            show(none, all),
            "uid 65534, no capabilities, no new privileges, seccomp, landlock"
        );
        let little = r#""no_new_privs":false,"dumpable":true,"seccomp":"off","landlock":"none""#;
        let one = none.replace("\"permitted\":0", "\"permitted\":4096");
        assert_eq!(show(&one, little), "uid 65534, capabilities 0x1000");
    }

    #[test]
    fn a_pause_is_shown_with_its_time() {
        let show = |json: &str| data_path(&serde_json::from_str(json).unwrap(), PLAIN);
        let path = "  data path: udp, 1 worker\n";
        let endless = show(r#"{"mode":"udp","workers":1,"quiesced":{"seconds_left":null}}"#);
        assert_eq!(endless, format!("{path}  quiesced: until it is resumed\n"));
        let short = show(
            r#"{"mode":"udp","workers":1,"quiesced":{"seconds_left":61},
                "sessions_cleared":{"slept":2}}"#,
        );
        let expected = "  quiesced: for 1 minute, 1 second\n  sessions cleared: slept 2\n";
        assert_eq!(short, format!("{path}{expected}"));
        assert_eq!(show(r#"{"mode":"udp","workers":1,"quiesced":null}"#), path);
    }

    #[test]
    fn what_is_done_to_packets_is_told_where_it_is_unusual() {
        let lines = |mss_clamp, copy_dscp| {
            let path = DataPath { mss_clamp, copy_dscp, workers: 1, ..DataPath::default() };
            data_path(&path, PLAIN).lines().skip(1).collect::<Vec<_>>().join("\n")
        };
        assert_eq!(lines(None, None), "");
        assert_eq!(lines(Some(true), Some(false)), "");
        assert_eq!(lines(Some(false), Some(true)), "  mss clamp: off\n  copy dscp: on");
    }

    #[test]
    fn a_mode_has_its_reason() {
        let path = DataPath {
            mode: "udp".to_owned(),
            reason: Some("no NIC was named".to_owned()),
            workers: 1,
            ..DataPath::default()
        };
        assert_eq!(data_path(&path, PLAIN), "  data path: udp, 1 worker: no NIC was named\n");
    }

    #[test]
    fn whether_the_tun_device_is_steered_is_told_where_there_are_workers_to_choose_from() {
        let line = |workers, is_on, reason: Option<&str>| {
            let tun_steering = Some(Steering { is_on, reason: reason.map(str::to_owned) });
            let path =
                DataPath { mode: "udp".to_owned(), workers, tun_steering, ..DataPath::default() };
            data_path(&path, PLAIN).lines().nth(1).map(|line| line.trim().to_owned())
        };
        assert_eq!(line(1, false, Some("there is one worker")), None);
        assert_eq!(line(2, true, None).unwrap(), "tun steering: on");
        assert_eq!(line(2, true, Some("map full")).unwrap(), "tun steering: on: map full");
        assert_eq!(
            line(2, false, Some("no such kernel")).unwrap(),
            "tun steering: off: no such kernel"
        );
        let socket_steering = Some(Steering { is_on: true, reason: None });
        let path = DataPath { workers: 2, socket_steering, handed_on: 7, ..DataPath::default() };
        let text = data_path(&path, PLAIN);
        assert!(
            text.ends_with("  socket steering: on\n  handed on to other workers: 7\n"),
            "{text}"
        );
        let path = DataPath { fanned_out: 3, ..path };
        assert!(data_path(&path, PLAIN).ends_with("\n  batches that other workers did: 3\n"));
    }
}
