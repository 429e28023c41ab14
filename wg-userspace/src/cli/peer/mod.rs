//! `peer add`, `peer remove`, `peer list`: the peers of a config file, by their names.
//!
//! A file is locked from reading to the end of it all, changed in one place ([`config::edit`]), and an
//! interface that is up by it follows as with `reload`. If that fails, the file is put back. The
//! private key of a new peer is in the text that is printed for it, and nowhere else.

mod addresses;
pub mod args;
mod choose;
mod list;
mod name;
mod qr;
mod target;

use std::{
    collections::HashMap,
    fs::{self, File},
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use anyhow::Context as _;
use zeroize::Zeroizing;

use self::{choose::Chosen, target::Target};
use super::{
    Code, Failure, difference,
    end_file::{EndConfig, EndPeer, OwnKey, Place, write_config, write_plain},
    files::unreadable,
    keys, print, reload,
    rewrite::Lock,
    running::Running,
    show,
    socket::Socket,
    up,
};
use crate::{
    config::{
        self, Config,
        edit::{NewPeer, add_peer, remove_peer},
    },
    key::{PresharedKey, PrivateKey, PublicKey},
    sys::random::Rng,
};

pub fn peer(what: args::Peer) -> Result<Code, Failure> {
    match what {
        args::Peer::Add(arguments) => add(&arguments),
        args::Peer::Remove(arguments) => remove(&arguments),
        args::Peer::List(arguments) => list::list(&arguments),
    }
}

fn add(arguments: &args::Add) -> Result<Code, Failure> {
    let mut file = Opened::of(&arguments.what)?;
    let within = |failure: Failure| failure.within(file.target.name());
    let config = &file.config;
    let chosen = choose::choose(arguments, config).map_err(within)?;
    let keys = NewKeys::make(arguments);
    let new = NewPeer {
        name: arguments.name.as_str(),
        public_key: keys.public_key,
        preshared_key: keys.preshared_key.as_ref(),
        allowed_ips: &chosen.allowed_ips,
    };
    if arguments.dry_run {
        print(&preview(&new, arguments.public_key.is_none()))?;
        return Ok(Code::Ok);
    }
    let shown = client_text(arguments, &file, &chosen, &keys).map_err(within)?;
    let after = add_peer(&file.target.name(), &file.text, &new).map_err(Failure::config)?;
    let read = config::parse(&file.target.name(), &after)
        .map_err(|errors| Failure::config(errors).and("the file was left as it is"))?;
    let is_read_so = read.peers.last().is_some_and(|peer| {
        *peer.public_key == new.public_key
            && peer.name.as_ref().is_some_and(|name| name.value == new.name)
    });
    if !is_read_so {
        let line = "a peer of this name would not be read as it was written; take another name";
        return Err(within(Failure::new(Code::Usage, line)));
    }
    file.refuse_other_changes()?;
    let out = arguments.out.as_deref().map(NewFile::create).transpose()?;
    let code = file.change(&after)?;
    let written = match &out {
        Some(out) => out.write(&shown),
        None => keys::print_secret(&shown),
    };
    if let Err(failure) = written {
        // Nobody has the peer's key.
        return Err(match file.take_back(&after) {
            Ok(_) => failure.and("the peer was removed again"),
            Err(taking) => {
                taking.print();
                failure.and("the peer is there nevertheless; remove it by `tidegate peer remove`")
            }
        });
    }
    let addresses: Vec<String> =
        chosen.addresses.iter().map(|net| net.addr().to_string()).collect();
    file.tell(format_args!("added {}: {}", arguments.name, addresses.join(", ")));
    for hint in &chosen.hints {
        file.tell(hint);
    }
    if let Some(out) = out {
        let path = out.keep();
        file.tell(format_args!(
            "{}'s own config, with its private key, is {}",
            arguments.name,
            path.display()
        ));
    }
    Ok(code)
}

fn remove(arguments: &args::Remove) -> Result<Code, Failure> {
    let mut file = Opened::of(&arguments.what)?;
    let name = file.target.name();
    let key = find(&file.config, &arguments.peer).map_err(|failure| failure.within(&name))?;
    let after = remove_peer(&name, &file.text, &key).map_err(Failure::config)?;
    let after = after.context("finding the peer's section")?;
    if let Err(errors) = config::parse(&name, &after) {
        return Err(Failure::config(errors).and("the file was left as it is"));
    }
    let peer = file.config.peers.iter().find(|peer| *peer.public_key == key);
    let label = peer.map(|peer| difference::Label(peer).to_string()).unwrap_or_default();
    if arguments.dry_run {
        print(&format!("- peer {label}\n"))?;
        return Ok(Code::Ok);
    }
    file.refuse_other_changes()?;
    let code = file.change(&after)?;
    file.tell(format_args!("removed {label}"));
    Ok(code)
}

/// The key of the peer that a word means.
fn find(config: &Config, word: &str) -> Result<PublicKey, Failure> {
    let is_key = PublicKey::from_base64(word);
    if let Some(peer) = config.peers.iter().find(|peer| is_key == Ok(*peer.public_key)) {
        return Ok(*peer.public_key);
    }
    let named =
        |peer: &&config::PeerConfig| peer.name.as_ref().is_some_and(|name| name.value == word);
    let mut found = config.peers.iter().filter(named);
    match (found.next(), found.next()) {
        (Some(peer), None) => Ok(*peer.public_key),
        (Some(_), Some(_)) => {
            let line =
                format!("several peers are called `{word}`; say which one by its public key");
            Err(Failure::new(Code::Usage, line))
        }
        (None, _) => {
            let line =
                format!("there is no peer `{word}`; `tidegate peer list` shows those that are");
            Err(Failure::new(Code::Existence, line))
        }
    }
}

/// A file that nobody else changes meanwhile.
struct Opened {
    target: Target,
    text: Zeroizing<String>,
    config: Config,
    lock: Lock,
}

impl Opened {
    fn of(word: &str) -> Result<Opened, Failure> {
        let target = Target::of(word)?;
        let path = &target.file.path;
        let lock = Lock::of(path).map_err(|error| unreadable(path, &error))?;
        let text = up::read(path)?;
        let config = config::parse(&target.name(), &text).map_err(Failure::config)?;
        Ok(Opened { target, text, config, lock })
    }

    /// Refuses if the device is not what the file says: it would become that, too.
    fn refuse_other_changes(&self) -> Result<(), Failure> {
        if !self.target.is_up {
            return Ok(());
        }
        let interface = &self.target.file.interface;
        let socket = Socket::find(interface)?.ok_or_else(|| show::not_found(interface))?;
        let running = Running::ask(interface, &socket)?;
        let found = difference::of_device(&running, &self.config, None, &HashMap::new());
        if found.is_none() {
            return Ok(());
        }
        let line = format!(
            "the interface is not what {} says already; use `tidegate reload` if the file is right, or \
             `tidegate save` if the interface is (`tidegate reload --dry-run` shows what differs)",
            self.target.name()
        );
        Err(Failure::new(Code::Runtime, line).within(interface))
    }

    /// Writes another text into the file, and lets the interface follow.
    fn change(&mut self, text: &str) -> Result<Code, Failure> {
        self.write(text)?;
        self.follow(text).map_err(|failure| match self.put_back() {
            Ok(()) => failure.and("the file was put back"),
            Err(putting) => {
                putting.print();
                failure.and("the file could not be put back")
            }
        })
    }

    /// Undoes a change that has been made.
    fn take_back(&mut self, text: &str) -> Result<Code, Failure> {
        self.put_back()?;
        let before = self.text.clone();
        self.follow(&before).inspect_err(|_| {
            // The file says what runs.
            let _ = self.write(text);
        })
    }

    fn put_back(&mut self) -> Result<(), Failure> {
        let before = self.text.clone();
        self.write(&before)
    }

    fn write(&mut self, text: &str) -> Result<(), Failure> {
        let doing = || format!("writing {}", self.target.file.path.display());
        Ok(self.lock.replace(text.as_bytes()).with_context(doing)?)
    }

    fn follow(&self, text: &str) -> Result<Code, Failure> {
        if !self.target.is_up {
            return Ok(Code::Ok);
        }
        reload::follow(&self.target.file, text, false, |lines| {
            eprint!("{lines}");
            Ok(())
        })
    }

    /// Says something that is no part of the result.
    fn tell(&self, line: impl std::fmt::Display) {
        eprintln!("tidegate: {}: {line}", self.target.name());
    }
}

/// The keys of a new peer.
struct NewKeys {
    /// Nothing if the peer has one already.
    private_key: Option<PrivateKey>,
    public_key: PublicKey,
    preshared_key: Option<PresharedKey>,
}

impl NewKeys {
    fn make(arguments: &args::Add) -> NewKeys {
        let preshared_key = arguments.psk.then(|| PresharedKey::generate(&mut Rng));
        match arguments.public_key {
            Some(public_key) => NewKeys { private_key: None, public_key, preshared_key },
            None => {
                let private_key = PrivateKey::generate(&mut Rng);
                let public_key = private_key.public_key();
                NewKeys { private_key: Some(private_key), public_key, preshared_key }
            }
        }
    }
}

/// What would be added to the file. Keys that were made for it are of no use to anybody.
fn preview(new: &NewPeer<'_>, is_new_key: bool) -> String {
    let zero = PresharedKey::default();
    let shown = NewPeer { preshared_key: new.preshared_key.map(|_| &zero), ..*new };
    let mut text = shown.section("\n").replace(&*zero.to_base64(), "(a new one)");
    if is_new_key {
        text = text.replace(&new.public_key.to_string(), "(that of a new private key)");
    }
    text
}

/// What is printed for the peer.
fn client_text(
    arguments: &args::Add,
    file: &Opened,
    chosen: &Chosen,
    keys: &NewKeys,
) -> Result<Zeroizing<String>, Failure> {
    let interface = &file.config.interface;
    let private = keys.private_key.clone();
    let client = EndConfig {
        about: vec![
            format!(
                "{}'s end of {}, made by `tidegate peer add`.",
                arguments.name, file.target.file.interface
            ),
            "\"There\" is the other end's file.".to_owned(),
        ],
        addresses: chosen.addresses.clone(),
        listen_port: None,
        endpoint: None,
        key: private.map_or(OwnKey::Public(keys.public_key), OwnKey::Private),
        dns: arguments.dns.clone(),
        mtu: interface.mtu.as_deref().copied(),
        about_forwarding: Vec::new(),
        nat: Vec::new(),
        allow: Vec::new(),
        peers: vec![EndPeer {
            name: None,
            about: Vec::new(),
            public_key: interface.private_key.public_key(),
            preshared_key: keys.preshared_key.clone(),
            allowed_ips: chosen.routes.clone(),
            place: chosen.endpoint.clone().map_or(Place::Unknown, Place::At),
            persistent_keepalive: Some(arguments.keepalive).filter(|&seconds| seconds != 0),
        }],
    };
    if !arguments.qr {
        return Ok(write_config(&client));
    }
    qr::code(&write_plain(&client), show::wants_colour()).map_err(|error| {
        let line =
            format!("the peer's config does not fit into a QR code ({error}); leave `--qr` out");
        Failure::new(Code::Usage, line)
    })
}

/// A file that nobody had before, and that goes again unless it is kept.
struct NewFile {
    path: Option<PathBuf>,
    file: File,
}

impl NewFile {
    fn create(path: &Path) -> Result<NewFile, Failure> {
        match File::options().write(true).create_new(true).mode(0o600).open(path) {
            Ok(file) => Ok(NewFile { path: Some(path.to_owned()), file }),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                let line = format_args!(
                    "{} exists already and nothing was changed; name another file",
                    path.display()
                );
                Err(Failure::new(Code::Existence, line))
            }
            Err(error) => {
                let doing = format!("writing {}", path.display());
                Err(anyhow::Error::new(error).context(doing).into())
            }
        }
    }

    fn write(&self, text: &str) -> Result<(), Failure> {
        let mut file = &self.file;
        let written = file.write_all(text.as_bytes()).and_then(|()| file.sync_all());
        Ok(written.context("writing the peer's config")?)
    }

    fn keep(mut self) -> PathBuf {
        self.path.take().unwrap_or_default()
    }
}

impl Drop for NewFile {
    fn drop(&mut self) {
        if let Some(path) = &self.path {
            let _ = fs::remove_file(path);
        }
    }
}
