//! The sections of a file, line by line, into a [`Config`] or its mistakes.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::net::SocketAddr;
use std::sync::Arc;

use ipnet::IpNet;

use super::instructions::read;
use super::keys::{Directive, Key, Section};
use super::lines::{Line, Text};
use super::problem::{Mistake, Source};
use super::{
    Allow, Config, ConfigErrors, Endpoint, Forward, Hook, HookEvent, Interface, Limit, Nat,
    OwnEndpoint, PeerConfig, Span, Spanned, Table, Xdp, name_problem, values,
};
use crate::key::{PresharedKey, PrivateKey, PublicKey};

/// The sections as far as they are read.
#[derive(Default)]
pub struct Parser {
    /// What is wrong so far.
    pub mistakes: Vec<Mistake>,
    current: Current,
    /// The `[Interface]` as far as it is read.
    pub interface: InterfaceDraft,
    peers: Vec<PeerConfig>,
    /// Of peers without a name of ours, by their indexes.
    friendly_names: Vec<(usize, Spanned<String>)>,
    /// Where each public key stands first.
    public_keys: HashMap<PublicKey, Span>,
}

/// The section to which the next entry belongs.
#[derive(Default)]
enum Current {
    /// None so far.
    #[default]
    Start,
    Interface,
    Peer(Box<PeerDraft>),
    /// One that does not exist; what stands in it is passed over, since one error is enough.
    Unknown,
}

/// An `[Interface]` that may lack anything.
#[derive(Default)]
pub struct InterfaceDraft {
    /// Where its first header stands.
    header: Option<Span>,
    seen: Seen,
    private_key: Option<Spanned<PrivateKey>>,
    is_private_key_clamped: bool,
    listen_port: Option<Spanned<u16>>,
    fwmark: Option<Spanned<u32>>,
    addresses: Vec<Spanned<IpNet>>,
    dns: Vec<Spanned<String>>,
    mtu: Option<Spanned<u16>>,
    table: Option<Spanned<Table>>,
    hooks: Vec<Spanned<Hook>>,
    save_config: Option<Spanned<bool>>,
    endpoint: Option<Spanned<OwnEndpoint>>,
    /// `#! Xdp`
    pub xdp: Option<Spanned<Xdp>>,
    /// `#! Workers`
    pub workers: Option<Spanned<usize>>,
    /// `#! MssClamp`
    pub mss_clamp: Option<Spanned<bool>>,
    /// `#! CopyDscp`
    pub copy_dscp: Option<Spanned<bool>>,
    /// `#! Nat`
    pub nat: Vec<Spanned<Nat>>,
    /// `#! Forward`
    pub forward: Vec<Spanned<Forward>>,
    /// `#! Allow`
    pub allow: Vec<Spanned<Allow>>,
    metrics: Option<Spanned<SocketAddr>>,
    /// What this version does not follow.
    pub later: Vec<Spanned<Directive>>,
}

struct PeerDraft {
    header: Span,
    seen: Seen,
    public_key: Option<Spanned<PublicKey>>,
    preshared_key: Option<Spanned<PresharedKey>>,
    allowed_ips: Vec<Spanned<IpNet>>,
    endpoint: Option<Spanned<Endpoint>>,
    persistent_keepalive: Option<Spanned<u16>>,
    name: Option<Spanned<String>>,
    friendly_name: Option<Spanned<String>>,
    limit: Option<Spanned<Limit>>,
    later: Vec<Spanned<Directive>>,
}

impl PeerDraft {
    fn new(header: Span) -> Self {
        Self {
            header,
            seen: Seen::default(),
            public_key: None,
            preshared_key: None,
            allowed_ips: Vec::new(),
            endpoint: None,
            persistent_keepalive: None,
            name: None,
            friendly_name: None,
            limit: None,
            later: Vec::new(),
        }
    }
}

/// Which names a section has had, and where, even if their values were wrong.
#[derive(Default)]
struct Seen {
    keys: Vec<(Key, Span)>,
    directives: Vec<(Directive, Span)>,
}

/// Notes a name, or says where it stood before.
fn note<T: Copy + PartialEq>(seen: &mut Vec<(T, Span)>, name: T, at: Span) -> Result<(), Span> {
    match seen.iter().find(|(known, _)| *known == name) {
        Some(&(_, first)) => Err(first),
        None => {
            seen.push((name, at));
            Ok(())
        }
    }
}

/// A name that stands in a section once too often.
fn twice(name: &str, first: Span, again: Span) -> Mistake {
    Mistake::new(format!("`{name}` is set twice"))
        .at(again, "again here")
        .at(first, "first here")
        .help("keep one of the two lines")
}

/// A name in a section where it has no meaning.
fn misplaced(name: &str, at: Span, section: Section) -> Mistake {
    let article = match section {
        Section::Interface => "the",
        Section::Peer => "a",
    };
    Mistake::new(format!("`{name}` does not belong here"))
        .at(at, format!("`{name}` belongs into [{}]", section.name()))
        .help(format!("move the line below {article} [{}] header", section.name()))
}

impl Parser {
    /// Takes a line, whatever it is.
    pub fn line(&mut self, line: Line<'_>) {
        let outcome = match line {
            Line::Section { name } => self.section(name),
            Line::BrokenSection(text) => {
                self.end_peer();
                self.current = Current::Unknown;
                Err(Mistake::new(format!("`{}` is not a section", text.quoted()))
                    .at(text.span(), "a section is a name in brackets, alone in its line")
                    .help("sections are [Interface] and [Peer]"))
            }
            Line::Entry { key, value } => self.entry(key, value),
            Line::Directive { key, value } => self.directive(key, value),
            Line::FriendlyName(name) => {
                if let Current::Peer(peer) = &mut self.current {
                    peer.friendly_name = Some(Spanned::new(name.raw.to_owned(), name.span()));
                }
                Ok(())
            }
            Line::Stray(text) => Err(stray(text)),
        };
        self.mistakes.extend(outcome.err());
    }

    fn section(&mut self, name: Text<'_>) -> Result<(), Mistake> {
        self.end_peer();
        match Section::find(name.raw) {
            Some(Section::Interface) => {
                // A second [Interface] continues the first one, as for wg(8).
                self.interface.header.get_or_insert(name.span());
                self.current = Current::Interface;
            }
            Some(Section::Peer) => {
                self.current = Current::Peer(Box::new(PeerDraft::new(name.span())));
            }
            None => {
                self.current = Current::Unknown;
                let networkd = ["NetDev", "WireGuard", "WireGuardPeer", "Match", "Network"];
                let is_networkd = networkd.iter().any(|known| name.raw.eq_ignore_ascii_case(known));
                return Err(Mistake::new(format!("unknown section [{}]", name.quoted()))
                    .at(name.span(), "not a section of wg(8)")
                    .help(match Section::nearest(name.raw) {
                        _ if is_networkd => "files of systemd-networkd are not read: sections \
                                             are [Interface] and [Peer]"
                            .to_owned(),
                        Some(section) => format!("did you mean [{}]?", section.name()),
                        None => "sections are [Interface] and [Peer]".to_owned(),
                    }));
            }
        }
        Ok(())
    }

    fn entry(&mut self, name: Text<'_>, value: Text<'_>) -> Result<(), Mistake> {
        let (section, seen) = match &mut self.current {
            Current::Unknown => return Ok(()),
            Current::Start => {
                return Err(Mistake::new(format!("`{}` stands in no section", name.quoted()))
                    .at(name.span(), "there is no section above this line")
                    .help(match Key::find(name.raw) {
                        Some(key) => format!("write [{}] above it", key.section().name()),
                        None => "write [Interface] or [Peer] above it".to_owned(),
                    }));
            }
            Current::Interface => (Section::Interface, &mut self.interface.seen),
            Current::Peer(peer) => (Section::Peer, &mut peer.seen),
        };
        let Some(key) = Key::find(name.raw) else { return Err(unknown_key(name, section)) };
        if key.section() != section {
            return Err(misplaced(key.name(), name.span(), key.section()));
        }
        if !key.repeats()
            && let Err(first) = note(&mut seen.keys, key, name.span())
        {
            return Err(twice(key.name(), first, name.span()));
        }
        if value.is_empty() && !key.may_be_empty() {
            return Err(Mistake::new(format!("`{}` has no value", key.name()))
                .at(name.span(), "nothing stands after `=`")
                .help("write a value, or remove the line"));
        }
        let mistake_count = self.mistakes.len();
        match &mut self.current {
            Current::Interface => {
                self.interface.entry(key, value, &mut self.mistakes);
            }
            Current::Peer(peer) => peer.entry(key, value, &mut self.mistakes),
            Current::Start | Current::Unknown => unreachable!("handled above"),
        }
        let is_quote = |c: char| matches!(c, '"' | '\'' | '`' | '‘'..='‟' | '«' | '»');
        if value.raw.starts_with(is_quote) || value.raw.ends_with(is_quote) {
            for mistake in &mut self.mistakes[mistake_count..] {
                mistake.set_help("write the value without quotation marks");
            }
        }
        Ok(())
    }

    fn directive(&mut self, name: Text<'_>, value: Option<Text<'_>>) -> Result<(), Mistake> {
        let (section, seen) = match &mut self.current {
            Current::Unknown => return Ok(()),
            Current::Start => (None, None),
            Current::Interface => (Some(Section::Interface), Some(&mut self.interface.seen)),
            Current::Peer(peer) => (Some(Section::Peer), Some(&mut peer.seen)),
        };
        let word = name.before(' ');
        let Some(directive) = Directive::find(name.raw).or_else(|| Directive::find(word.raw))
        else {
            // Only what looks like `word = value` is a mistake; prose and `#!/bin/sh` are comments.
            let is_word = !name.is_empty() && name.raw.chars().all(|c| c.is_ascii_alphanumeric());
            return if is_word && value.is_some() {
                Err(unknown_directive(name, section.unwrap_or(Section::Interface)))
            } else {
                Ok(())
            };
        };
        let (Some(section), Some(seen)) = (section, seen) else {
            return Err(Mistake::new(format!("`#! {}` stands in no section", directive.name()))
                .at(name.span(), "there is no section above this line")
                .help(format!("move the line below [{}]", directive.section().name())));
        };
        if directive.section() != section {
            return Err(misplaced(directive.name(), name.span(), directive.section()));
        }
        if !directive.repeats()
            && let Err(first) = note(&mut seen.directives, directive, name.span())
        {
            return Err(twice(directive.name(), first, name.span()));
        }
        let value = match value {
            Some(value) if !value.is_empty() && Directive::find(name.raw).is_some() => value,
            _ => {
                return Err(Mistake::new(format!("`#! {}` has no value", directive.name()))
                    .at(name.span(), format!("expected `#! {} = value`", directive.name()))
                    .help(
                        "`#!` lines are instructions to Tidegate; a plain comment begins with `#`",
                    ));
            }
        };
        let later = (!directive.is_built()).then(|| Spanned::new(directive, name.span()));
        match &mut self.current {
            Current::Peer(peer) => {
                peer.directive(directive, value)?;
                peer.later.extend(later);
            }
            _ => {
                self.interface.directive(directive, value)?;
                self.interface.later.extend(later);
            }
        }
        Ok(())
    }

    /// Completes the [Peer] that is being read, if any.
    pub fn end_peer(&mut self) {
        let Current::Peer(peer) = std::mem::take(&mut self.current) else { return };
        let Some(public_key) = peer.public_key else {
            if !peer.seen.keys.iter().any(|(key, _)| *key == Key::PublicKey) {
                self.mistakes.push(
                    Mistake::new("a peer has no `PublicKey`")
                        .at(peer.header, "this peer")
                        .help("write `PublicKey = ` and the peer's public key below it"),
                );
            }
            return;
        };
        match self.public_keys.entry(public_key.value) {
            Entry::Vacant(entry) => {
                entry.insert(public_key.span);
            }
            Entry::Occupied(entry) => {
                self.mistakes.push(
                    Mistake::new("two peers have the same `PublicKey`")
                        .at(public_key.span, "again here")
                        .at(*entry.get(), "first here")
                        .help("make one [Peer] of the two, or correct one of the keys"),
                );
            }
        }
        if let (None, Some(name)) = (&peer.name, peer.friendly_name) {
            self.friendly_names.push((self.peers.len(), name));
        }
        self.peers.push(PeerConfig {
            public_key,
            preshared_key: peer.preshared_key,
            allowed_ips: peer.allowed_ips,
            endpoint: peer.endpoint,
            persistent_keepalive: peer.persistent_keepalive,
            name: peer.name,
            limit: peer.limit,
            later: peer.later,
        });
    }

    /// Sees to it that no two peers have the same name.
    fn end_names(&mut self) {
        let mut names: HashMap<String, Span> = HashMap::new();
        for name in self.peers.iter().filter_map(|peer| peer.name.as_ref()) {
            match names.entry(name.value.clone()) {
                Entry::Vacant(entry) => {
                    entry.insert(name.span);
                }
                Entry::Occupied(entry) => self.mistakes.push(
                    Mistake::new("two peers have the same name")
                        .at(name.span, "again here")
                        .at(*entry.get(), "first here")
                        .help("give one of the two peers another `#! Name`"),
                ),
            }
        }
        for (index, name) in std::mem::take(&mut self.friendly_names) {
            if name_problem(&name.value).is_none()
                && let Entry::Vacant(entry) = names.entry(name.value.clone())
            {
                entry.insert(name.span);
                self.peers[index].name = Some(name);
            }
        }
    }

    /// The file as a whole, or all that is wrong with it. The last [Peer] has been completed.
    pub fn finish(mut self, source: &Source) -> Result<Config, ConfigErrors> {
        self.end_names();
        let draft = self.interface;
        if let Some(private_key) = &draft.private_key {
            self.mistakes.extend(own_key_as_peer(private_key, &self.public_keys));
        } else if !draft.seen.keys.iter().any(|(key, _)| *key == Key::PrivateKey) {
            let help = "write `PrivateKey = ` and a key of `tidegate genkey` below [Interface]";
            self.mistakes.push(match draft.header {
                Some(header) => Mistake::new("the interface has no `PrivateKey`")
                    .at(header, "this interface")
                    .help(help),
                None => Mistake::new("the file has no [Interface]")
                    .at(Span::new(0.into(), 0), "in this file")
                    .help(help),
            });
        }
        self.mistakes.sort_by_key(Mistake::offset);
        let problems = self.mistakes.into_iter().map(|mistake| mistake.into_problem(source));
        if let Some(errors) = ConfigErrors::new(problems.collect()) {
            return Err(errors);
        }
        let interface = Interface {
            private_key: draft.private_key.expect("without one there was a mistake"),
            is_private_key_clamped: draft.is_private_key_clamped,
            listen_port: draft.listen_port,
            fwmark: draft.fwmark,
            addresses: draft.addresses,
            dns: draft.dns,
            mtu: draft.mtu,
            table: draft.table,
            hooks: draft.hooks,
            save_config: draft.save_config,
            endpoint: draft.endpoint,
            xdp: draft.xdp,
            workers: draft.workers,
            mss_clamp: draft.mss_clamp,
            copy_dscp: draft.copy_dscp,
            nat: draft.nat,
            forward: draft.forward,
            allow: draft.allow,
            metrics: draft.metrics,
            later: draft.later,
        };
        Ok(Config { interface, peers: self.peers, source: Arc::clone(source) })
    }
}

/// Puts a value in its place, or its mistake among the others.
fn put<T>(
    place: &mut Option<Spanned<T>>,
    value: Text<'_>,
    outcome: Result<T, Mistake>,
    mistakes: &mut Vec<Mistake>,
) {
    match outcome {
        Ok(parsed) => *place = Some(Spanned::new(parsed, value.span())),
        Err(mistake) => mistakes.push(mistake),
    }
}

impl InterfaceDraft {
    /// Takes the value of a key of this section.
    fn entry(&mut self, key: Key, value: Text<'_>, mistakes: &mut Vec<Mistake>) {
        let hook = |event| Hook { event, command: value.raw.to_owned() };
        let hook = match key {
            Key::PrivateKey => {
                let parsed = values::key(key, value, PrivateKey::from_base64);
                self.is_private_key_clamped = values::is_clamped(value);
                return put(&mut self.private_key, value, parsed, mistakes);
            }
            Key::ListenPort => {
                return put(&mut self.listen_port, value, values::listen_port(value), mistakes);
            }
            Key::FwMark => return put(&mut self.fwmark, value, values::fwmark(value), mistakes),
            Key::MTU => return put(&mut self.mtu, value, values::mtu(value), mistakes),
            Key::Table => return put(&mut self.table, value, values::table(value), mistakes),
            Key::SaveConfig => {
                return put(&mut self.save_config, value, values::save_config(value), mistakes);
            }
            Key::Address => {
                for word in values::words(value) {
                    match values::network(word) {
                        Ok(address) => self.addresses.push(Spanned::new(address, word.span())),
                        Err(mistake) => mistakes.push(mistake),
                    }
                }
                return;
            }
            Key::DNS => {
                let owned = |word: Text<'_>| Spanned::new(word.raw.to_owned(), word.span());
                return self.dns.extend(values::words(value).map(owned));
            }
            Key::PreUp => hook(HookEvent::PreUp),
            Key::PostUp => hook(HookEvent::PostUp),
            Key::PreDown => hook(HookEvent::PreDown),
            Key::PostDown => hook(HookEvent::PostDown),
            Key::PublicKey
            | Key::PresharedKey
            | Key::AllowedIPs
            | Key::Endpoint
            | Key::PersistentKeepalive => unreachable!("keys of other sections are refused before"),
        };
        if !value.is_empty() {
            self.hooks.push(Spanned::new(hook, value.span()));
        }
    }

    /// Takes the value of an instruction of this section.
    fn directive(&mut self, directive: Directive, value: Text<'_>) -> Result<(), Mistake> {
        let span = value.span();
        match directive {
            Directive::Endpoint => {
                self.endpoint = Some(Spanned::new(values::own_endpoint(value)?, span));
            }
            Directive::Xdp => self.xdp = Some(Spanned::new(values::xdp(value)?, span)),
            Directive::Workers => self.workers = Some(Spanned::new(values::workers(value)?, span)),
            Directive::MssClamp => {
                self.mss_clamp = Some(Spanned::new(read::switch(value, directive)?, span));
            }
            Directive::CopyDscp => {
                self.copy_dscp = Some(Spanned::new(read::switch(value, directive)?, span));
            }
            Directive::Nat => self.nat.push(Spanned::new(read::nat(value)?, span)),
            Directive::Forward => self.forward.push(Spanned::new(read::forward(value)?, span)),
            Directive::Allow => self.allow.push(Spanned::new(read::allow(value)?, span)),
            Directive::Metrics => self.metrics = Some(Spanned::new(read::metrics(value)?, span)),
            Directive::Dashboard => {}
            Directive::Name | Directive::Limit => {
                unreachable!("instructions of other sections are refused before")
            }
        }
        Ok(())
    }
}

impl PeerDraft {
    /// Takes the value of a key of this section.
    fn entry(&mut self, key: Key, value: Text<'_>, mistakes: &mut Vec<Mistake>) {
        match key {
            Key::PublicKey => {
                let parsed = values::key(key, value, PublicKey::from_base64);
                put(&mut self.public_key, value, parsed, mistakes);
            }
            Key::PresharedKey => {
                let parsed = values::key(key, value, PresharedKey::from_base64);
                put(&mut self.preshared_key, value, parsed, mistakes);
            }
            Key::Endpoint => put(&mut self.endpoint, value, values::endpoint(value), mistakes),
            Key::PersistentKeepalive => {
                let parsed = values::persistent_keepalive(value);
                put(&mut self.persistent_keepalive, value, parsed, mistakes);
            }
            Key::AllowedIPs => {
                for item in values::networks(value) {
                    match item {
                        Ok(net) => {
                            self.allowed_ips.push(Spanned::new(net.value.trunc(), net.span));
                        }
                        Err(mistake) => mistakes.push(mistake),
                    }
                }
            }
            _ => unreachable!("keys of other sections are refused before"),
        }
    }
}

impl PeerDraft {
    /// Takes the value of an instruction of this section.
    fn directive(&mut self, directive: Directive, value: Text<'_>) -> Result<(), Mistake> {
        let span = value.span();
        match directive {
            Directive::Name => self.name = Some(Spanned::new(read::name(value)?, span)),
            Directive::Limit => self.limit = Some(Spanned::new(read::limit(value)?, span)),
            _ => unreachable!("instructions of other sections are refused before"),
        }
        Ok(())
    }
}

/// A line that is nothing.
fn stray(text: Text<'_>) -> Mistake {
    let word = text.before(' ').before('\t').before(':').trim();
    let mistake = Mistake::new("this line is neither a section nor `Key = value`")
        .at(text.span(), "expected `Key = value`");
    match Key::find(word.raw) {
        Some(key) => mistake.help(format!("write `{} = ` and the value", key.name())),
        None => mistake.help("a comment begins with `#`"),
    }
}

fn unknown_key(name: Text<'_>, section: Section) -> Mistake {
    let mistake = Mistake::new(format!("unknown key `{}`", name.quoted()))
        .at(name.span(), format!("not a key of [{}]", section.name()));
    if let Some(directive) = Directive::find(name.raw) {
        let name = directive.name();
        return mistake.help(format!("keys of Tidegate stand behind `#!`: write `#! {name} = …`"));
    }
    const OF_AMNEZIA: [&str; 9] = ["Jc", "Jmin", "Jmax", "S1", "S2", "H1", "H2", "H3", "H4"];
    if OF_AMNEZIA.iter().any(|known| name.raw.eq_ignore_ascii_case(known)) {
        return mistake.help(
            "AmneziaWG has this key; it speaks another protocol, which WireGuard does not understand",
        );
    }
    match Key::nearest(name.raw, section) {
        Some(key) if key.section() == section => {
            mistake.help(format!("did you mean `{}`?", key.name()))
        }
        Some(key) => {
            let other = key.section().name();
            mistake.help(format!("did you mean `{}`, which belongs into [{other}]?", key.name()))
        }
        None => {
            let own = Key::ALL.iter().filter(|key| key.section() == section);
            let names: Vec<_> = own.map(|key| key.name()).collect();
            mistake.help(format!("keys of [{}]: {}", section.name(), names.join(", ")))
        }
    }
}

fn unknown_directive(name: Text<'_>, section: Section) -> Mistake {
    let mistake = Mistake::new(format!("unknown instruction `#! {}`", name.quoted()))
        .at(name.span(), "not an instruction to Tidegate");
    match Directive::nearest(name.raw, section) {
        Some(directive) => mistake.help(format!("did you mean `#! {}`?", directive.name())),
        None => mistake.help("to make it a comment, begin the line with `# `"),
    }
}

/// The mistakes of naming oneself as a peer, or of giving a peer one's private key.
fn own_key_as_peer(
    private_key: &Spanned<PrivateKey>,
    public_keys: &HashMap<PublicKey, Span>,
) -> Vec<Mistake> {
    let mut mistakes = Vec::new();
    if let Some(&span) = public_keys.get(&private_key.public_key()) {
        mistakes.push(
            Mistake::new("a peer has the key of this interface")
                .at(span, "this is the public key of the interface itself")
                .at(private_key.span, "it belongs to this key")
                .help("write the public key of the other side, or remove the peer"),
        );
    }
    if let Some(&span) = public_keys.get(&PublicKey::from_bytes(*private_key.expose())) {
        mistakes.push(
            Mistake::new("a peer's `PublicKey` is the private key of this interface")
                .at(span, "a secret does not belong here")
                .at(private_key.span, "the same as here")
                .help("write the peer's public key; make a new private key if this one got about"),
        );
    }
    mistakes
}
