//! The clsact qdiscs of links, and the filters at their ingress: where TC programs are on kernels that have no
//! links for them (before 6.6). By netlink, in the calling thread's network namespace.

use std::io;

use rtnetlink::packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, NLM_F_REQUEST, NlasIterator,
};
use rtnetlink::sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};

use super::errno::{EEXIST, EINVAL};

/// `struct nlmsghdr` and `struct tcmsg`.
const HEADER_LEN: usize = 16;
const TC_LEN: usize = 20;
const ERROR: u16 = 2;
const DONE: u16 = 3;
/// `TC_H_INGRESS`, which is `TC_H_CLSACT`, too: where the qdisc is; and its two sides.
const QDISC: u32 = 0xffff_fff1;
const INGRESS: u32 = 0xffff_fff2;
const EGRESS: u32 = 0xffff_fff3;
const QDISC_HANDLE: u32 = 0xffff_0000;
const TCA_KIND: u16 = 1;
const TCA_OPTIONS: u16 = 2;
const TCA_BPF_NAME: u16 = 7;

/// A filter at a link's ingress.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Filter {
    /// The link.
    pub ifindex: u32,
    /// Those with the least number come first.
    pub priority: u16,
    /// Tells it from others of this priority; 0 if this stands for all of them.
    pub handle: u32,
    /// Its kind: `bpf`, `u32`, `flower` and so on.
    pub kind: String,
    /// What whoever attached it calls its program, if it is one.
    pub program: Option<String>,
    /// Priority and protocol, as the kernel has them.
    info: u32,
}

/// The links with a clsact or ingress qdisc.
///
/// # Errors
/// If the kernel does not answer.
pub fn links() -> io::Result<Vec<u32>> {
    let told = ask(libc::RTM_GETQDISC, NLM_F_DUMP, &Message::default())?;
    let has = |message: &&Told| matches!(&*message.kind, "clsact" | "ingress");
    Ok(told.iter().filter(has).map(|message| message.ifindex).collect())
}

/// Gives a link a clsact qdisc; `false` if it has one, or an ingress qdisc, which does as well.
///
/// # Errors
/// Why the kernel refuses: it has no such qdiscs, or the link is gone.
pub fn add(ifindex: u32) -> io::Result<bool> {
    let message = Message {
        ifindex,
        handle: QDISC_HANDLE,
        parent: QDISC,
        kind: Some("clsact"),
        ..Message::default()
    };
    match ask(libc::RTM_NEWQDISC, NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL, &message) {
        Ok(_) => Ok(true),
        Err(error) if error.raw_os_error() == Some(EEXIST) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Takes a link's qdisc away if nobody has filters at it.
///
/// # Errors
/// Why the kernel refuses.
pub fn remove_unused(ifindex: u32) -> io::Result<()> {
    // In between, somebody may add one: the kernel removes the qdisc with what is at it.
    if !(at(ifindex, INGRESS)?.is_empty() && at(ifindex, EGRESS)?.is_empty()) {
        return Ok(());
    }
    let message = Message { ifindex, handle: QDISC_HANDLE, parent: QDISC, ..Message::default() };
    ask(libc::RTM_DELQDISC, NLM_F_ACK, &message).map(drop)
}

/// The filters at a link's ingress; none if it has no such qdisc.
///
/// # Errors
/// If the kernel does not answer.
pub fn filters(ifindex: u32) -> io::Result<Vec<Filter>> {
    at(ifindex, INGRESS)
}

fn at(ifindex: u32, side: u32) -> io::Result<Vec<Filter>> {
    let message = Message { ifindex, parent: side, ..Message::default() };
    let told = match ask(libc::RTM_GETTFILTER, NLM_F_DUMP, &message) {
        // The link has gone, or its qdisc.
        Err(error) if error.raw_os_error() == Some(EINVAL) => return Ok(Vec::new()),
        told => told?,
    };
    Ok(told.into_iter().map(Told::into_filter).collect())
}

/// Removes one filter.
///
/// # Errors
/// Why the kernel refuses; that it is gone, for one.
pub fn remove(filter: &Filter) -> io::Result<()> {
    let &Filter { ifindex, handle, info, .. } = filter;
    debug_assert_ne!(handle, 0, "one filter, and not all of a priority");
    let message = Message { ifindex, handle, parent: INGRESS, info, kind: None };
    ask(libc::RTM_DELTFILTER, NLM_F_ACK, &message).map(drop)
}

/// What is asked.
#[derive(Default)]
struct Message {
    ifindex: u32,
    handle: u32,
    parent: u32,
    info: u32,
    kind: Option<&'static str>,
}

impl Message {
    fn bytes(&self, kind: u16, flags: u16) -> Vec<u8> {
        let attribute = self.kind.map(|kind| {
            let mut bytes = ((5 + kind.len()) as u16).to_ne_bytes().to_vec();
            bytes.extend(TCA_KIND.to_ne_bytes());
            bytes.extend(kind.as_bytes());
            bytes.resize((bytes.len() + 1).next_multiple_of(4), 0);
            bytes
        });
        let attribute = attribute.unwrap_or_default();
        let len = HEADER_LEN + TC_LEN + attribute.len();
        let mut message = Vec::with_capacity(len);
        message.extend((len as u32).to_ne_bytes());
        message.extend(kind.to_ne_bytes());
        message.extend((flags | NLM_F_REQUEST).to_ne_bytes());
        // Sequence, port, family with padding.
        message.extend([0; 12]);
        for word in [self.ifindex, self.handle, self.parent, self.info] {
            message.extend(word.to_ne_bytes());
        }
        message.extend(attribute);
        message
    }
}

/// What is answered.
#[derive(Debug, Default)]
struct Told {
    ifindex: u32,
    handle: u32,
    info: u32,
    kind: String,
    program: Option<String>,
}

impl Told {
    /// Reads a message without its `struct nlmsghdr`.
    fn parse(body: &[u8]) -> Option<Self> {
        let (header, attributes) = body.split_at_checked(TC_LEN)?;
        let word = |at: usize| header[at..].first_chunk().map(|word| u32::from_ne_bytes(*word));
        let mut told =
            Self { ifindex: word(4)?, handle: word(8)?, info: word(16)?, ..Self::default() };
        for attribute in NlasIterator::new(attributes).flatten() {
            match attribute.kind() {
                TCA_KIND => told.kind = text(attribute.value()),
                TCA_OPTIONS => {
                    let mut options = NlasIterator::new(attribute.value()).flatten();
                    let name = options.find(|option| option.kind() == TCA_BPF_NAME);
                    told.program = name.map(|name| text(name.value()));
                }
                _ => {}
            }
        }
        // Options of other kinds have other numbers.
        told.program = told.program.filter(|_| told.kind == "bpf");
        Some(told)
    }

    fn into_filter(self) -> Filter {
        let Self { ifindex, handle, info, kind, program } = self;
        Filter { ifindex, priority: (info >> 16) as u16, handle, kind, program, info }
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).trim_end_matches('\0').to_owned()
}

/// Asks, and gives all that is answered.
fn ask(kind: u16, flags: u16, message: &Message) -> io::Result<Vec<Told>> {
    let mut socket = Socket::new(NETLINK_ROUTE)?;
    socket.bind_auto()?;
    socket.connect(&SocketAddr::new(0, 0))?;
    socket.send(&message.bytes(kind, flags), 0)?;
    let mut told = Vec::new();
    loop {
        let (answer, _) = socket.recv_from_full()?;
        let mut rest = &answer[..];
        while rest.len() >= HEADER_LEN {
            let word = |at: usize| {
                rest.get(at..at + 4)
                    .map(|word| u32::from_ne_bytes([word[0], word[1], word[2], word[3]]))
            };
            let invalid =
                || io::Error::new(io::ErrorKind::InvalidData, "unexpected netlink answer");
            let len = word(0).ok_or_else(invalid)? as usize;
            let body = rest.get(HEADER_LEN..len).ok_or_else(invalid)?;
            match u16::from_ne_bytes([rest[4], rest[5]]) {
                // Both begin with 0 or a number of an error, negative.
                ERROR | DONE => {
                    return match word(HEADER_LEN).map_or(0, |errno| errno as i32) {
                        0 => Ok(told),
                        errno => Err(io::Error::from_raw_os_error(-errno)),
                    };
                }
                _ => told.push(Told::parse(body).ok_or_else(invalid)?),
            }
            rest = rest.get(len.next_multiple_of(4)..).unwrap_or_default();
        }
    }
}
