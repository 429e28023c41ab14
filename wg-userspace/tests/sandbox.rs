//! What a process can and cannot do once it has given up what it may do.
//!
//! ```text
//! test ── fork ── enter_early ── a thread starts ── seal ── one thing is tried ── exit code or signal
//! ```
//!
//! Each thing is tried in a process of its own, since many of them are its end. It is a fork without
//! another program: privileges are given up while there is one thread, which a test is not.

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::mem::MaybeUninit;
use std::net::UdpSocket;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _, parent_id};
use std::process::{Command, Output};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use rustix::mm::{MapFlags, MprotectFlags, ProtFlags, mmap_anonymous, mprotect};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
};
use rustix::process::{DumpableBehavior, Signal, Uid};
use rustix::thread::UnshareFlags;
use wg_userspace::sandbox::{self, Error, Landlock, NOBODY, Options, Report, Seccomp};
use wg_userspace::sys::process::call;
use wg_userspace::sys::wait::{PollFd, PollFlags};
use wg_userspace::sys::{EventFd, clock, memory, netns, poll};

/// A thread that was made between the two steps does these.
type Job = Box<dyn FnOnce() + Send>;

/// Runs `body` in a fork of this process. Exits with 0 if it returns.
#[expect(unsafe_code, reason = "a fork")]
fn forked(body: impl Fn() + Send + Sync + 'static) -> Output {
    let mut command = Command::new("/nothing/is/executed");
    let in_child = move || -> io::Result<()> {
        // A panic here says why on standard error, and aborts.
        body();
        std::process::exit(0);
    };
    // SAFETY: the child executes no program, and goes on as a process of one thread. Of what other
    // threads may have locked it uses the allocator alone, which glibc makes whole after a fork.
    unsafe { command.pre_exec(in_child) };
    command.output().expect("there is a process")
}

/// Prints past the lock of standard output, which another thread may have held at the fork.
fn print_raw(text: &[u8]) {
    assert_eq!(rustix::io::write(rustix::stdio::stdout(), text), Ok(text.len()));
}

fn enter() -> Report {
    let options = Options { parent: Some(parent_id()), ..Options::default() };
    sandbox::enter_early(&options).unwrap_or_else(|error| panic!("{error}"))
}

fn seal(entered: &Report) -> Report {
    sandbox::seal(entered).unwrap_or_else(|error| panic!("{error}"))
}

/// Gives everything up in a fork, then runs `body` with the report and a thread of before.
fn sandboxed(body: impl Fn(&Report, &Sender<Job>) + Send + Sync + 'static) -> Output {
    forked(move || {
        let entered = enter();
        let (jobs, todo): (Sender<Job>, Receiver<Job>) = channel();
        std::thread::spawn(move || todo.into_iter().for_each(|job| job()));
        body(&seal(&entered), &jobs);
    })
}

fn text(bytes: &[u8]) -> std::borrow::Cow<'_, str> {
    String::from_utf8_lossy(bytes)
}

fn assert_success(output: &Output) {
    assert!(output.status.success(), "{}: {}", output.status, text(&output.stderr));
}

fn assert_killed(output: &Output, what: &str) {
    let is_killed = output.status.signal() == Some(Signal::SYS.as_raw());
    assert!(is_killed, "{what}: {}: {}", output.status, text(&output.stderr));
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// Makes a system call for which no library here has a function.
#[expect(unsafe_code, reason = "system calls with arguments that make no sense")]
fn raw(number: i64) {
    // SAFETY: with zeros for arguments those that are tried have no effect, were they allowed.
    unsafe { call::syscall(number, 0, 0, 0, 0, 0, 0) };
}

const PAGE_LEN: usize = 4096;

#[expect(unsafe_code, reason = "a mapping")]
fn map(protection: ProtFlags) -> *mut std::ffi::c_void {
    // SAFETY: the kernel chooses where it is.
    unsafe { mmap_anonymous(std::ptr::null_mut(), PAGE_LEN, protection, MapFlags::PRIVATE) }
        .expect("memory")
}

#[expect(unsafe_code, reason = "memory that is executable")]
fn make_executable() {
    let page = map(ProtFlags::READ);
    // SAFETY: nobody uses the page.
    let _ = unsafe { mprotect(page, PAGE_LEN, MprotectFlags::READ | MprotectFlags::EXEC) };
}

#[expect(unsafe_code, reason = "another namespace")]
fn unshare() {
    // SAFETY: it leaves memory and descriptors as they are.
    let _ = unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWUSER) };
}

fn netlink() -> io::Result<()> {
    rustix::net::socket(AddressFamily::NETLINK, SocketType::RAW, None)?;
    Ok(())
}

fn signal_parent() -> io::Result<()> {
    let parent = rustix::process::getppid().ok_or(io::ErrorKind::NotFound)?;
    // Whose default is that nothing happens.
    Ok(rustix::process::kill_process(parent, Signal::WINCH)?)
}

#[test]
fn what_a_library_may_try_fails_and_the_process_goes_on() {
    const FILE: &str = "/tmp/tidegate-sandbox-test";
    type Try = (&'static str, fn() -> io::Result<()>);
    let tries: [Try; 11] = [
        ("opening a file", || File::open("/etc/hostname").map(drop)),
        ("making a file", || File::create(FILE).map(drop)),
        ("removing a file", || std::fs::remove_file(FILE)),
        ("listing a directory", || std::fs::read_dir("/").map(drop)),
        ("asking of a file", || std::fs::metadata("/etc/hostname").map(drop)),
        ("opening what it runs", || File::open("/proc/self/maps").map(drop)),
        ("a UDP socket", || UdpSocket::bind("127.0.0.1:0").map(drop)),
        ("a TCP connection", || std::net::TcpStream::connect("127.0.0.1:1").map(drop)),
        ("a Unix connection", || UnixStream::connect(FILE).map(drop)),
        ("a netlink socket", netlink),
        ("a signal to another process", signal_parent),
    ];
    for (what, attempt) in tries {
        assert_success(&sandboxed(move |_, _| {
            let error = attempt().expect_err(what);
            assert_eq!(error.kind(), io::ErrorKind::PermissionDenied, "{what}: {error}");
        }));
    }
}

#[test]
fn what_only_an_intruder_asks_for_kills() {
    let tries: [(&str, fn()); 23] = [
        ("executing a program", || drop(Command::new("/bin/true").exec())),
        ("a process", || drop(Command::new("/bin/true").status())),
        ("a thread", || drop(std::thread::Builder::new().spawn(|| {}))),
        ("executable memory", || {
            map(ProtFlags::READ | ProtFlags::EXEC);
        }),
        ("memory made executable", make_executable),
        ("listening", || {
            let _ = rustix::net::listen(rustix::stdio::stdin(), 1);
        }),
        ("becoming root", || {
            let _ = rustix::thread::set_thread_res_uid(Uid::ROOT, Uid::ROOT, Uid::ROOT);
        }),
        ("another namespace", unshare),
        ("capabilities", || {
            let sets = rustix::thread::capabilities(None).expect("it may ask");
            let _ = rustix::thread::set_capabilities(None, sets);
        }),
        ("outliving its parent", || {
            let _ = rustix::process::set_parent_process_death_signal(None);
        }),
        ("core dumps", || {
            let _ = rustix::process::set_dumpable_behavior(DumpableBehavior::Dumpable);
        }),
        ("bind(2)", || raw(call::SYS_bind)),
        ("bpf(2)", || raw(call::SYS_bpf)),
        ("mount(2)", || raw(call::SYS_mount)),
        ("ptrace(2)", || raw(call::SYS_ptrace)),
        ("process_vm_readv(2)", || raw(call::SYS_process_vm_readv)),
        ("io_uring_setup(2)", || raw(call::SYS_io_uring_setup)),
        ("keyctl(2)", || raw(call::SYS_keyctl)),
        ("userfaultfd(2)", || raw(call::SYS_userfaultfd)),
        ("perf_event_open(2)", || raw(call::SYS_perf_event_open)),
        ("pidfd_open(2)", || raw(call::SYS_pidfd_open)),
        ("seccomp(2)", || raw(call::SYS_seccomp)),
        ("a signal to another process's thread", || raw(call::SYS_tgkill)),
    ];
    for (what, attempt) in tries {
        assert_killed(&sandboxed(move |_, _| attempt()), what);
    }
}

#[test]
fn a_thread_of_before_is_held_as_well() {
    assert_success(&sandboxed(|_, jobs| {
        let (done, wait) = channel();
        let job = move || {
            let opened = File::open("/etc/hostname").map(drop);
            done.send(opened.map_err(|error| error.kind())).expect("somebody waits");
        };
        jobs.send(Box::new(job)).expect("the thread is there");
        assert_eq!(wait.recv().expect("it answers"), Err(io::ErrorKind::PermissionDenied));
    }));
    let output = sandboxed(|_, jobs| {
        jobs.send(Box::new(|| raw(call::SYS_bpf))).expect("the thread is there");
        std::thread::sleep(Duration::from_secs(30));
    });
    assert_killed(&output, "the whole process");
}

/// Everything that the data path and its control thread do while they run, by descriptors that were
/// opened before.
#[test]
fn what_a_data_process_does_goes_on() {
    let udp = UdpSocket::bind("127.0.0.1:0").expect("a socket");
    let event = EventFd::new().expect("a descriptor");
    let mut file = tempfile::tempfile().expect("a file");
    file.write_all(b"of before").expect("it is written");
    assert_success(&forked(move || {
        let entered = enter();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.expect("a runtime");
        let (mut near, far) = UnixStream::pair().expect("sockets");
        let (listener, client) = listener_with_client(&runtime);
        let flags = SocketFlags::CLOEXEC;
        let (ours, theirs) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).expect("sockets");
        let (jobs, todo): (Sender<Job>, Receiver<Job>) = channel();
        std::thread::scope(|scope| {
            let event = &event;
            scope.spawn(move || {
                todo.recv().expect("something to do")();
                event.signal();
                far
            });
            seal(&entered);

            // Threads wake each other, and wait with a time.
            jobs.send(Box::new(|| std::thread::sleep(Duration::from_millis(1)))).expect("a thread");
            let mut fds = [PollFd::new(event, PollFlags::IN)];
            assert_eq!(poll(&mut fds, Duration::from_secs(30)).expect("it may poll"), 1);
            assert!(event.drain());
            let (_sender, receiver) = channel::<()>();
            assert!(receiver.recv_timeout(Duration::from_millis(1)).is_err());
            std::thread::yield_now();
        });

        // Packets.
        let to = udp.local_addr().expect("an address");
        assert_eq!(udp.send_to(b"packet", to).expect("it is sent"), 6);
        assert_eq!(udp.recv_from(&mut [0; 16]).expect("it comes").0, 6);

        // Time, chance, memory.
        assert!(clock::boot_now() <= clock::boot_now());
        let mut chance = [0; 600];
        getrandom::fill(&mut chance).expect("chance");
        let mut big = vec![1_u8; 64 << 20];
        big.resize(128 << 20, 2);
        assert_eq!(big.iter().step_by(1 << 20).map(|&byte| u64::from(byte)).sum::<u64>(), 192);
        drop(big);

        // Files by their descriptors, and memory for a successor.
        let mut copy = [0; 9];
        std::os::unix::fs::FileExt::read_exact_at(&file, &mut copy, 0).expect("it is read");
        assert_eq!(&copy, b"of before");
        assert_eq!(file.metadata().expect("a length").len(), 9);
        let memory = memory::memfd("tidegate-test", 8192).expect("memory");
        assert_eq!(memory::memfd_len(&memory).expect("a length"), 8192);
        drop(memory::Memory::shared(memory.as_fd(), 0, 8192).expect("a mapping"));
        drop(memory.try_clone().expect("another descriptor"));

        // The control thread: clients, and descriptors that are handed over.
        assert_eq!(near.read(&mut [0; 1]).expect("the other end is closed"), 0);
        runtime.block_on(serve(&listener, client));
        let sent = send_descriptor(&ours, event.as_fd());
        assert_eq!(sent.expect("it may send descriptors"), 1);
        let received = receive_descriptor(&theirs).expect("it may receive them");
        rustix::io::write(&received, &1_u64.to_ne_bytes()).expect("it is open");
        assert!(event.drain(), "they are the same");
    }));
}

/// A socket on which a client waits already.
fn listener_with_client(
    runtime: &tokio::runtime::Runtime,
) -> (tokio::net::UnixListener, UnixStream) {
    use std::os::linux::net::SocketAddrExt as _;
    use std::os::unix::net::{SocketAddr, UnixListener};
    let name = format!("tidegate-sandbox-test-{}", std::process::id());
    let address = SocketAddr::from_abstract_name(name).expect("a name");
    let listener = UnixListener::bind_addr(&address).expect("a socket");
    let client = UnixStream::connect_addr(&address).expect("a connection");
    listener.set_nonblocking(true).expect("a socket");
    let _runtime = runtime.enter();
    (tokio::net::UnixListener::from_std(listener).expect("a socket"), client)
}

/// Serves a client that has connected before, as the UAPI server does.
async fn serve(listener: &tokio::net::UnixListener, mut client: UnixStream) {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    client.write_all(b"get=1\n").expect("it is sent");
    tokio::time::sleep(Duration::from_millis(2)).await;
    let (mut stream, _) = listener.accept().await.expect("a client");
    stream.peer_cred().expect("who it is");
    let mut line = [0; 6];
    stream.read_exact(&mut line).await.expect("it comes");
    stream.write_all(&line).await.expect("it is sent");
    stream.shutdown().await.expect("it ends");
    let mut answer = Vec::new();
    client.read_to_end(&mut answer).expect("it comes");
    assert_eq!(answer, b"get=1\n");
}

fn send_descriptor(socket: &OwnedFd, descriptor: BorrowedFd<'_>) -> rustix::io::Result<usize> {
    let descriptors = [descriptor];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    assert!(ancillary.push(SendAncillaryMessage::ScmRights(&descriptors)));
    sendmsg(socket, &[io::IoSlice::new(b"x")], &mut ancillary, SendFlags::empty())
}

fn receive_descriptor(socket: &OwnedFd) -> Option<OwnedFd> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    let flags = RecvFlags::CMSG_CLOEXEC;
    recvmsg(socket, &mut [io::IoSliceMut::new(&mut byte)], &mut ancillary, flags).ok()?;
    ancillary.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
        _ => None,
    })
}

#[test]
fn a_backtrace_and_an_abort_need_nothing_more() {
    assert_success(&sandboxed(|_, _| {
        let backtrace = std::backtrace::Backtrace::force_capture().to_string();
        assert!(!backtrace.is_empty());
    }));
    let output = sandboxed(|_, _| std::process::abort());
    assert_eq!(output.status.signal(), Some(Signal::ABORT.as_raw()), "it says how it ended");
}

#[test]
fn the_report_says_what_the_kernel_says() {
    let output = sandboxed(|report, _| {
        print_raw(&serde_json::to_vec(report).expect("plain data"));
        let status = rustix::thread::capabilities(None).expect("it may ask");
        assert!(status.permitted.is_empty() && status.effective.is_empty());
    });
    assert_success(&output);
    let report: Report = serde_json::from_slice(&output.stdout).expect("a report");
    assert_eq!(report.seccomp, Seccomp::Filter);
    assert!(report.no_new_privs && !report.dumpable);
    let capabilities = report.capabilities;
    assert_eq!(capabilities.effective | capabilities.permitted | capabilities.inheritable, 0);
    assert_eq!(capabilities.ambient, 0);
    if is_root() {
        assert_eq!((report.uid, report.gid), (NOBODY, NOBODY));
        assert_eq!(capabilities.bounding, 0);
    } else {
        assert_eq!(report.uid, rustix::process::geteuid().as_raw());
    }
}

#[test]
fn files_are_out_of_reach_before_system_calls_are() {
    let output = forked(|| {
        let entered = enter();
        assert_eq!(entered.seccomp, Seccomp::Off);
        if entered.landlock == Landlock::None {
            print_raw(b"no Landlock");
            return;
        }
        for opened in [File::open("/etc/hostname"), File::open("/"), File::open("/dev/null")] {
            assert_eq!(opened.map(drop).unwrap_err().kind(), io::ErrorKind::PermissionDenied);
        }
    });
    assert_success(&output);
    if !output.stdout.is_empty() {
        netns::report_skipped(
            "sandbox::files_are_out_of_reach_before_system_calls_are",
            "this kernel has no Landlock",
        );
    }
}

#[test]
fn root_does_not_come_back() {
    if !is_root() {
        netns::report_skipped("sandbox::root_does_not_come_back", "needs root");
        return;
    }
    assert_success(&forked(|| {
        enter();
        assert!(rustix::process::getgroups().expect("groups").is_empty());
        let root = rustix::thread::set_thread_res_uid(Uid::ROOT, Uid::ROOT, Uid::ROOT);
        assert_eq!(root, Err(rustix::io::Errno::PERM));
        let net_admin = rustix::thread::CapabilitySet::NET_ADMIN;
        let mut sets = rustix::thread::capabilities(None).expect("it may ask");
        sets.permitted = net_admin;
        assert!(rustix::thread::set_capabilities(None, sets).is_err());
    }));
}

#[test]
fn threads_that_would_keep_their_privileges_are_an_error() {
    let error = sandbox::enter_early(&Options::default()).expect_err("a test has a main thread");
    assert!(matches!(error, Error::Threads(2..)), "{error}");
}

#[test]
fn who_has_lost_its_parent_does_not_begin() {
    assert_success(&forked(|| {
        let options = Options { parent: Some(1 << 22), ..Options::default() };
        let error = sandbox::enter_early(&options).expect_err("nobody has that number");
        assert!(matches!(error, Error::Orphaned(_)), "{error}");
    }));
}
