//! What was done for an interface, written down before it is done.
//!
//! `/run/tidegate/IF.state` has a line of JSON for each entry: a header, the steps, and what became
//! of them, written before it is done or undone. Whoever changes the host for an interface holds the file's lock meanwhile, so that a
//! process which is killed leaves a file that says what there is to undo, and that nobody uses.

use std::{
    fs::{self, File},
    io::{self, Read, Write},
    os::{
        fd::AsRawFd,
        unix::fs::{DirBuilderExt, MetadataExt},
    },
    path::{Path, PathBuf},
};

use anyhow::Context;
use rustix::{
    fs::{AtFlags, CWD, FlockOperation, Mode, OFlags},
    io::Errno,
    process::Pid,
};
use serde::{Deserialize, Serialize};

use super::{Code, Failure, applied::Applied, name::InterfaceName, steps::Step};
use crate::config::HookEvent;

/// Where the files are.
const STATE_DIR: &str = "/run/tidegate";

/// Version of the format; a file of another one is not touched.
const VERSION: u32 = 1;

/// What is known before the first step.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Header {
    version: u32,
    /// The interface.
    pub interface: String,
    /// The config file, as an absolute path.
    pub config: PathBuf,
    /// What the file wants to run when the interface goes down, with `%i` replaced.
    pub down_hooks: Vec<Hook>,
    /// Boot of the host in which the file was written.
    boot_id: String,
    /// The network namespace to which the steps belong.
    netns: u64,
}

/// A command of the config file and where it stands there.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Hook {
    /// When it runs.
    pub event: HookEvent,
    /// What the shell gets, with `%i` replaced.
    pub command: String,
    /// `file:line`
    pub place: String,
}

impl Header {
    /// For steps that this process is about to do.
    ///
    /// # Errors
    /// If `/proc` cannot be read.
    pub fn new(
        interface: &InterfaceName,
        config: &Path,
        down_hooks: Vec<Hook>,
    ) -> io::Result<Header> {
        Ok(Header {
            version: VERSION,
            interface: interface.as_str().to_owned(),
            config: std::path::absolute(config)?,
            down_hooks,
            boot_id: boot_id()?,
            netns: netns()?,
        })
    }

    /// Whether the steps were done since this host booted: nothing of what came before is left.
    pub fn is_of_this_boot(&self) -> bool {
        boot_id().is_ok_and(|id| id == self.boot_id)
    }

    /// Whether the steps were done in the network namespace of this process.
    pub fn is_of_this_netns(&self) -> bool {
        netns().is_ok_and(|id| id == self.netns)
    }
}

fn boot_id() -> io::Result<String> {
    Ok(fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned())
}

fn netns() -> io::Result<u64> {
    Ok(fs::metadata("/proc/thread-self/ns/net")?.ino())
}

/// A process, told from later ones with its number.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Process {
    pid: i32,
    /// When it started, in clock ticks after the boot.
    started: u64,
}

impl Process {
    /// A process that runs; nothing if it does not.
    pub fn of(pid: Pid) -> Option<Process> {
        let pid = pid.as_raw_nonzero().get();
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        let (state, started) = state_and_start(&stat)?;
        // A zombie only waits for its parent to look.
        (state != 'Z').then_some(Process { pid, started })
    }

    /// Whether it still runs.
    pub fn is_alive(self) -> bool {
        Pid::from_raw(self.pid).and_then(Process::of) == Some(self)
    }

    /// Its number.
    pub fn pid(self) -> Option<Pid> {
        Pid::from_raw(self.pid)
    }
}

/// The fields `state` and `starttime` of proc_pid_stat(5), the 3rd and the 22nd. The 2nd is a name
/// in parentheses that may hold anything.
fn state_and_start(stat: &str) -> Option<(char, u64)> {
    let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace();
    let state = fields.next()?.chars().next()?;
    Some((state, fields.nth(18)?.parse().ok()?))
}

/// The place of a step in a ledger.
#[derive(Clone, Copy, Debug, Deserialize, Eq, Ord, PartialEq, PartialOrd, Serialize)]
pub struct StepId(usize);

/// A step that was noted and not forgotten.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Noted {
    /// Its place.
    pub id: StepId,
    /// The step.
    pub step: Step,
    /// Whether it is known to be there. If not, it may be undone, done, or done in part.
    pub done: bool,
}

/// A line after the header.
#[derive(Debug, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
enum Entry {
    Step(Step),
    Done(StepId),
    Undoing(StepId),
    Forgotten(StepId),
    Keeper(Process),
    Table(u32),
    Applying(Box<Applied>),
    Applied(Box<Applied>),
    Up,
}

/// What a file says.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Record {
    /// The header.
    pub header: Header,
    /// The process that holds the device open, once there was one.
    pub keeper: Option<Process>,
    /// The routing table that is meant for default routes, once one was chosen.
    pub table: Option<u32>,
    /// What the config file said when it was carried out last.
    pub applied: Option<Applied>,
    /// What a reload that did not come to its end was about to carry out: some of it may be there.
    pub applying: Option<Applied>,
    /// Whether `up` came to its end.
    pub is_up: bool,
    steps: Vec<Option<Noted>>,
}

impl Record {
    fn new(header: Header) -> Record {
        Record {
            header,
            keeper: None,
            table: None,
            applied: None,
            applying: None,
            is_up: false,
            steps: Vec::new(),
        }
    }

    /// The steps that are not forgotten, in the order in which they were noted.
    pub fn steps(&self) -> impl DoubleEndedIterator<Item = &Noted> {
        self.steps.iter().flatten()
    }

    /// Whether the process that held the device open runs no more, or never ran.
    pub fn is_left_over(&self) -> bool {
        !self.keeper.is_some_and(Process::is_alive)
    }

    fn apply(&mut self, entry: Entry) {
        match entry {
            Entry::Step(step) => {
                let id = StepId(self.steps.len());
                self.steps.push(Some(Noted { id, step, done: false }));
            }
            Entry::Done(id) => {
                if let Some(Some(noted)) = self.steps.get_mut(id.0) {
                    noted.done = true;
                }
            }
            Entry::Undoing(id) => {
                if let Some(Some(noted)) = self.steps.get_mut(id.0) {
                    noted.done = false;
                }
            }
            Entry::Forgotten(id) => {
                if let Some(noted) = self.steps.get_mut(id.0) {
                    *noted = None;
                }
            }
            Entry::Keeper(keeper) => self.keeper = Some(keeper),
            Entry::Table(table) => self.table = Some(table),
            Entry::Applying(applied) => self.applying = Some(*applied),
            Entry::Applied(applied) => {
                self.applying = None;
                self.header.config.clone_from(&applied.config);
                self.header.down_hooks.clone_from(&applied.down_hooks);
                self.applied = Some(*applied);
            }
            Entry::Up => self.is_up = true,
        }
    }

    /// Reads a file. Its last line may be cut off: what it would have said was not begun.
    fn parse(text: &str) -> anyhow::Result<Record> {
        let mut lines = text.split_inclusive('\n').filter_map(|line| line.strip_suffix('\n'));
        let header: serde_json::Value =
            serde_json::from_str(lines.next().unwrap_or_default()).context("its header")?;
        let version = header["version"].as_u64();
        anyhow::ensure!(
            version == Some(VERSION.into()),
            "it was written by another version of Tidegate; take the interface down with that one"
        );
        let mut record = Record::new(serde_json::from_value(header).context("its header")?);
        for (number, line) in (2..).zip(lines) {
            let entry = serde_json::from_str(line).with_context(|| format!("its line {number}"))?;
            record.apply(entry);
        }
        Ok(record)
    }
}

/// The file of an interface, locked for this process.
#[derive(Debug)]
pub struct Ledger {
    path: PathBuf,
    file: File,
    record: Record,
}

impl Ledger {
    /// Begins the file of an interface.
    ///
    /// # Errors
    /// If there is one, or it cannot be written.
    pub fn create(header: Header) -> Result<Ledger, Failure> {
        Ledger::create_in(Path::new(STATE_DIR), header)
    }

    fn create_in(folder: &Path, header: Header) -> Result<Ledger, Failure> {
        let path = folder.join(format!("{}.state", header.interface));
        let doing = || format!("writing {}", path.display());
        make_folder(folder).with_context(|| format!("making the folder {}", folder.display()))?;
        // Nobody sees the file before it has its header and its lock.
        let flags = OFlags::RDWR | OFlags::TMPFILE | OFlags::APPEND | OFlags::CLOEXEC;
        let file = rustix::fs::open(folder, flags, Mode::RUSR | Mode::WUSR).with_context(doing)?;
        let mut file = File::from(file);
        rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).with_context(doing)?;
        write_line(&mut file, &header).with_context(doing)?;
        let from = format!("/proc/self/fd/{}", file.as_raw_fd());
        match rustix::fs::linkat(CWD, &from, CWD, &path, AtFlags::SYMLINK_FOLLOW) {
            Ok(()) => Ok(Ledger { path, file, record: Record::new(header) }),
            Err(Errno::EXIST) => {
                // Who looks for one to be undone comes here only if there was none a moment ago.
                let line = format_args!(
                    "another `tidegate` has begun, for {} exists already; try again when it is done",
                    path.display()
                );
                Err(Failure::new(Code::Existence, line))
            }
            Err(error) => Err(anyhow::Error::new(error).context(doing()).into()),
        }
    }

    /// Opens the file of an interface; nothing if there is none.
    ///
    /// # Errors
    /// If another process works on it, or it cannot be read.
    pub fn open(interface: &InterfaceName) -> Result<Option<Ledger>, Failure> {
        Ledger::open_in(Path::new(STATE_DIR), interface)
    }

    fn open_in(folder: &Path, interface: &InterfaceName) -> Result<Option<Ledger>, Failure> {
        let path = folder.join(format!("{interface}.state"));
        let doing = || format!("reading {}", path.display());
        let mut file = loop {
            let file = match File::options().read(true).append(true).open(&path) {
                Ok(file) => file,
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
                Err(error) => return Err(anyhow::Error::new(error).context(doing()).into()),
            };
            match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => {}
                Err(Errno::WOULDBLOCK) => {
                    let line = "another `tidegate` is at work on it; try again when it is done";
                    return Err(Failure::new(Code::Existence, line));
                }
                Err(error) => return Err(anyhow::Error::new(error).context(doing()).into()),
            }
            // One that was removed while we opened it may have a successor already.
            if file.metadata().with_context(doing)?.nlink() > 0 {
                break file;
            }
        };
        let mut text = String::new();
        file.read_to_string(&mut text).with_context(doing)?;
        let record = Record::parse(&text).with_context(doing)?;
        if !text.ends_with('\n') {
            let whole = text.rfind('\n').map_or(0, |end| end + 1);
            file.set_len(whole as u64).with_context(doing)?;
        }
        Ok(Some(Ledger { path, file, record }))
    }

    /// What the file of an interface says, if there is one that can be read. It is not locked: others
    /// may be changing it.
    pub fn peek(interface: &InterfaceName) -> Option<Record> {
        let path = Path::new(STATE_DIR).join(format!("{interface}.state"));
        Record::parse(&fs::read_to_string(path).ok()?).ok()
    }

    /// What the files of all other interfaces say, as far as they can be read. None is locked.
    pub fn others(interface: &InterfaceName) -> Vec<Record> {
        others_in(Path::new(STATE_DIR), interface)
    }

    /// Waits for a lock that keeps other processes from choosing tables and priorities. It ends
    /// with the value.
    ///
    /// # Errors
    /// If there is no folder for it.
    pub fn choose() -> io::Result<File> {
        let folder = Path::new(STATE_DIR);
        make_folder(folder)?;
        let folder = File::open(folder)?;
        rustix::io::retry_on_intr(|| rustix::fs::flock(&folder, FlockOperation::LockExclusive))?;
        Ok(folder)
    }

    /// What the file says.
    pub fn record(&self) -> &Record {
        &self.record
    }

    /// Notes a step that is about to be done.
    ///
    /// # Errors
    /// If it cannot be written; then it must not be done.
    pub fn note(&mut self, step: Step) -> io::Result<StepId> {
        let id = StepId(self.record.steps.len());
        self.write(Entry::Step(step))?;
        Ok(id)
    }

    /// Notes that a step is done.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn done(&mut self, id: StepId) -> io::Result<()> {
        self.write(Entry::Done(id))
    }

    /// Notes that a step is about to be undone.
    ///
    /// # Errors
    /// If it cannot be written; then it must not be undone.
    pub fn undoing(&mut self, id: StepId) -> io::Result<()> {
        self.write(Entry::Undoing(id))
    }

    /// Notes that a step is undone.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn forget(&mut self, id: StepId) -> io::Result<()> {
        self.write(Entry::Forgotten(id))
    }

    /// Notes who holds the device open.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn kept_by(&mut self, keeper: Process) -> io::Result<()> {
        self.write(Entry::Keeper(keeper))
    }

    /// Notes which routing table is meant for default routes: no other interface takes it.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn takes_table(&mut self, table: u32) -> io::Result<()> {
        self.write(Entry::Table(table))
    }

    /// Notes what the config file says that is about to be carried out.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn is_to_apply(&mut self, applied: Applied) -> io::Result<()> {
        self.write(Entry::Applying(Box::new(applied)))
    }

    /// Notes what the config file said that is now carried out. The hooks of `down` are its own from
    /// now on.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn applies(&mut self, applied: Applied) -> io::Result<()> {
        self.write(Entry::Applied(Box::new(applied)))
    }

    /// Notes that `up` came to its end.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn is_up(&mut self) -> io::Result<()> {
        self.write(Entry::Up)
    }

    /// Removes the file: there is nothing left to undo.
    ///
    /// # Errors
    /// If it cannot be removed.
    pub fn remove(self) -> io::Result<()> {
        fs::remove_file(&self.path)
    }

    fn write(&mut self, entry: Entry) -> io::Result<()> {
        write_line(&mut self.file, &entry)?;
        self.record.apply(entry);
        Ok(())
    }
}

/// Appends a line by one call, so that it is there as a whole or cut off at the end of the file.
fn write_line(file: &mut File, line: &impl Serialize) -> io::Result<()> {
    let mut text = serde_json::to_vec(line)?;
    text.push(b'\n');
    file.write_all(&text)
}

fn make_folder(folder: &Path) -> io::Result<()> {
    match fs::DirBuilder::new().mode(0o700).create(folder) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        result => result,
    }
}

fn others_in(folder: &Path, interface: &InterfaceName) -> Vec<Record> {
    let Ok(entries) = fs::read_dir(folder) else { return Vec::new() };
    let mut records: Vec<Record> = entries
        .filter_map(|entry| {
            let path = entry.ok()?.path();
            let name = path.file_name()?.to_str()?.strip_suffix(".state")?;
            if name == interface.as_str() {
                return None;
            }
            Record::parse(&fs::read_to_string(&path).ok()?).ok()
        })
        .collect();
    records.sort_by(|a, b| a.header.interface.cmp(&b.header.interface));
    records
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::applied::AtStart;

    fn name(text: &str) -> InterfaceName {
        text.parse().unwrap()
    }

    fn header(interface: &str) -> Header {
        let hook = Hook {
            event: HookEvent::PostDown,
            command: "iptables -D FORWARD -i wg0 -j ACCEPT".to_owned(),
            place: "wg0.conf:5".to_owned(),
        };
        Header::new(&name(interface), Path::new("wg0.conf"), vec![hook]).unwrap()
    }

    fn create(folder: &Path, interface: &str) -> Ledger {
        Ledger::create_in(folder, header(interface)).unwrap_or_else(|_| panic!("it can be made"))
    }

    fn open(folder: &Path, interface: &str) -> Option<Ledger> {
        Ledger::open_in(folder, &name(interface)).unwrap_or_else(|_| panic!("it can be read"))
    }

    fn refusal(result: Result<impl Sized, Failure>) -> (u8, String) {
        result.err().expect("it is refused").into_line()
    }

    #[test]
    fn what_was_noted_is_read_again() {
        let folder = tempfile::tempdir().unwrap();
        let mut ledger = create(folder.path(), "wg0");
        let daemon = ledger.note(Step::Daemon).unwrap();
        ledger.done(daemon).unwrap();
        let me = Process::of(rustix::process::getpid()).unwrap();
        ledger.kept_by(me).unwrap();
        let mtu = ledger.note(Step::Mtu(Some(1420))).unwrap();
        ledger.done(mtu).unwrap();
        ledger.forget(mtu).unwrap();
        ledger.note(Step::LinkUp).unwrap();
        ledger.is_up().unwrap();
        let written = ledger.record().clone();
        drop(ledger);

        let ledger = open(folder.path(), "wg0").unwrap();
        assert_eq!(*ledger.record(), written);
        let steps: Vec<_> = written.steps().map(|noted| (noted.step.clone(), noted.done)).collect();
        assert_eq!(steps, [(Step::Daemon, true), (Step::LinkUp, false)]);
        assert!(written.is_up && !written.is_left_over());
        assert!(written.header.is_of_this_boot() && written.header.is_of_this_netns());
        assert!(written.header.config.is_absolute());
        assert_eq!(written.header.down_hooks, header("wg0").down_hooks);

        ledger.remove().unwrap();
        assert!(open(folder.path(), "wg0").is_none());
    }

    #[test]
    fn only_its_owner_reads_a_file() {
        let parent = tempfile::tempdir().unwrap();
        let folder = parent.path().join("tidegate");
        let ledger = create(&folder, "wg0");
        assert_eq!(fs::metadata(&folder).unwrap().mode() & 0o777, 0o700);
        assert_eq!(fs::metadata(&ledger.path).unwrap().mode() & 0o777, 0o600);
    }

    #[test]
    fn one_process_at_a_time_works_on_it() {
        let folder = tempfile::tempdir().unwrap();
        let ledger = create(folder.path(), "wg0");
        let (code, line) = refusal(Ledger::open_in(folder.path(), &name("wg0")));
        assert!(code == 5 && line.contains("another `tidegate`"), "{line}");
        let (code, line) = refusal(Ledger::create_in(folder.path(), header("wg0")));
        assert!(code == 5 && line.contains("wg0.state exists already; "), "{line}");
        drop(ledger);
        assert!(open(folder.path(), "wg0").is_some());
    }

    #[test]
    fn what_is_about_to_be_undone_or_applied_is_in_doubt() {
        let folder = tempfile::tempdir().unwrap();
        let mut ledger = create(folder.path(), "wg0");
        let step = ledger.note(Step::LinkUp).unwrap();
        ledger.done(step).unwrap();
        ledger.undoing(step).unwrap();
        let applied = Applied {
            config: "/etc/wireguard/wg0.conf".into(),
            down_hooks: Vec::new(),
            endpoints: [].into(),
            fwmark: Some(7),
            mtu: None,
            at_start: AtStart::default(),
        };
        ledger.is_to_apply(applied.clone()).unwrap();
        drop(ledger);
        let mut ledger = open(folder.path(), "wg0").unwrap();
        let record = ledger.record();
        assert!(!record.steps().next().unwrap().done);
        assert_eq!((&record.applied, &record.applying), (&None, &Some(applied.clone())));
        assert_eq!(record.header.down_hooks.len(), 1, "they are those of before");
        ledger.applies(applied.clone()).unwrap();
        drop(ledger);
        let ledger = open(folder.path(), "wg0").unwrap();
        let record = ledger.record();
        assert_eq!((&record.applied, &record.applying), (&Some(applied), &None));
        assert!(record.header.down_hooks.is_empty());
    }

    #[test]
    fn a_line_cut_off_is_as_if_it_was_never_begun() {
        let folder = tempfile::tempdir().unwrap();
        let mut ledger = create(folder.path(), "wg0");
        ledger.note(Step::LinkUp).unwrap();
        ledger.file.write_all(b"{\"done\":").unwrap();
        drop(ledger);
        let mut ledger = open(folder.path(), "wg0").unwrap();
        assert!(!ledger.record().steps().next().unwrap().done);
        // What is written next stands in a line of its own.
        ledger.note(Step::Configure).unwrap();
        drop(ledger);
        let ledger = open(folder.path(), "wg0").unwrap();
        assert_eq!(ledger.record().steps().count(), 2);
    }

    #[test]
    fn a_file_that_makes_no_sense_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("wg0.state");
        for text in ["", "\n", "{}\n", "{\"version\":99}\n"] {
            fs::write(&path, text).unwrap();
            refusal(Ledger::open_in(folder.path(), &name("wg0")));
        }
        let header = serde_json::to_string(&header("wg0")).unwrap();
        fs::write(&path, format!("{header}\n{{\"fly\":1}}\n\"up\"\n")).unwrap();
        let (_, line) = refusal(Ledger::open_in(folder.path(), &name("wg0")));
        assert!(line.contains("its line 2"), "{line}");
        fs::write(&path, format!("{header}\n{{\"done\":7}}\n{{\"forgotten\":7}}\n")).unwrap();
        assert_eq!(open(folder.path(), "wg0").unwrap().record().steps().count(), 0);
    }

    #[test]
    fn a_file_of_nobody_is_left_over() {
        let folder = tempfile::tempdir().unwrap();
        let mut ledger = create(folder.path(), "wg0");
        assert!(ledger.record().is_left_over(), "there is no process yet");
        let me = Process::of(rustix::process::getpid()).unwrap();
        assert!(me.is_alive());
        // The same number, but started at another time.
        ledger.kept_by(Process { started: me.started + 1, ..me }).unwrap();
        assert!(ledger.record().is_left_over());
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let pid = Pid::from_child(&child);
        while Process::of(pid).is_some() {
            std::thread::yield_now();
        }
        child.wait().unwrap();
    }

    #[test]
    fn the_others_are_those_of_other_interfaces() {
        let folder = tempfile::tempdir().unwrap();
        assert!(others_in(&folder.path().join("none"), &name("wg0")).is_empty());
        let _ledgers = ["wg2", "wg0", "wg1"].map(|interface| create(folder.path(), interface));
        fs::write(folder.path().join("wg3.state"), "broken").unwrap();
        let others = others_in(folder.path(), &name("wg0"));
        let names: Vec<_> = others.iter().map(|record| &record.header.interface).collect();
        assert_eq!(names, ["wg1", "wg2"]);
    }

    #[test]
    fn a_name_in_stat_may_hold_anything() {
        let stat = "7 (a) b (c)) S 1 7 7 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 12345 9 9";
        assert_eq!(state_and_start(stat), Some(('S', 12345)));
        assert_eq!(state_and_start("7 (a) S 1"), None);
    }
}
