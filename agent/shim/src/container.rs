//! A container of the pod: its processes' streams, and its way from created over running to exited.

use std::fs;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;

use coracle_shim::protocol::{
    Create, Exit, HELPER_NAME, HELPER_STATUS_FD, HELPER_STDERR_FD, HELPER_STDIN_FD, HELPER_STDOUT_FD, Report,
};
use coracle_shim::wire::Receiver;
use nix::unistd::{ForkResult, Pid, fork};

use crate::log::{self, LogFile, Splitter, Stream};
use crate::{exec, pod};

/// More than this waits for an attached client that reads slowly, and the container's stream is not read.
const MAX_UNSENT: usize = 64 * 1024;

/// One output stream of a container.
pub struct Output {
    pub stream: Stream,
    /// `None` after its end.
    pub source: Option<OwnedFd>,
    splitter: Splitter,
    pub clients: Vec<Sink>,
}

/// Somebody attached to an output stream.
pub struct Sink {
    pub fd: OwnedFd,
    pub unsent: Vec<u8>,
}

/// The writing end of a container's standard input, and who feeds it.
#[derive(Default)]
pub struct Input {
    pub target: Option<OwnedFd>,
    pub unsent: Vec<u8>,
    pub clients: Vec<OwnedFd>,
}

/// Where a container is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// The helper runs.
    Creating,
    Created,
    /// Told to execute; the status pipe has not closed yet.
    Starting,
    Running,
    Exited(Exit),
}

pub struct Container {
    pub id: String,
    pub bundle: PathBuf,
    pub state: State,
    pub helper: Option<Pid>,
    pub pid: Option<Pid>,
    pub started_at: Option<u64>,
    /// Text that the helper writes when it fails.
    helper_errors: Option<io::PipeReader>,
    /// Closes when the program executes; carries the reason when it cannot.
    pub status: Option<io::PipeReader>,
    console: Option<UnixListener>,
    /// Master of the container's terminal.
    pub terminal: Option<OwnedFd>,
    pub input: Input,
    pub outputs: Vec<Output>,
    log: Option<LogFile>,
    stdin_once: bool,
    uid: u32,
    /// Requests that wait for a step: (client, call id).
    pub waiting: Option<(u64, u64)>,
}

impl Container {
    /// Starts the helper that creates the container.
    pub fn create(request: Create, program: OwnedFd) -> Result<Self, String> {
        let fail = |what: &'static str| move |error: io::Error| format!("{what}: {error}");
        let log = request.log.clone().map(LogFile::open).transpose().map_err(fail("open log"))?;
        let (status, status_writer) = io::pipe().map_err(fail("pipe"))?;
        let (helper_errors, errors_writer) = io::pipe().map_err(fail("pipe"))?;
        set_nonblocking(helper_errors.as_raw_fd()).map_err(fail("pipe"))?;
        let null: OwnedFd =
            fs::File::options().read(true).write(true).open("/dev/null").map_err(fail("open /dev/null"))?.into();
        let mut container = Self {
            id: request.container.clone(),
            bundle: request.bundle.clone(),
            state: State::Creating,
            helper: None,
            pid: None,
            started_at: None,
            helper_errors: Some(helper_errors),
            status: Some(status),
            console: None,
            terminal: None,
            input: Input::default(),
            outputs: Vec::new(),
            log,
            stdin_once: request.stdin_once,
            uid: request.uid,
            waiting: None,
        };
        let mut theirs = Vec::new();
        let mut console = String::new();
        if request.tty {
            let path = request.bundle.join("console.sock");
            let _ = fs::remove_file(&path);
            // The path of a unix socket is short; this process is in the pod's folder.
            let short = path.strip_prefix(std::env::current_dir().map_err(fail("cwd"))?).unwrap_or(&path).to_owned();
            let listener = UnixListener::bind(short).map_err(fail("listen for the terminal"))?;
            listener.set_nonblocking(true).map_err(fail("listen for the terminal"))?;
            container.console = Some(listener);
            console = path.to_string_lossy().into_owned();
        } else {
            theirs.push(container.make_input(request.stdin, &null)?);
            theirs.push(container.make_output(Stream::Stdout)?);
            theirs.push(container.make_output(Stream::Stderr)?);
        }
        // SAFETY: the shim has one thread.
        match unsafe { fork() }.map_err(|errno| format!("fork: {}", errno.desc()))? {
            ForkResult::Parent { child } => container.helper = Some(child),
            ForkResult::Child => {
                let error =
                    run_helper(&request, &program, &null, status_writer, errors_writer.into(), theirs, &console);
                let _ = io::stderr().write_all(error.as_bytes());
                // SAFETY: ends the child without running the parent's destructors.
                unsafe { libc::_exit(1) }
            }
        }
        Ok(container)
    }

    fn make_input(&mut self, wanted: bool, null: &OwnedFd) -> Result<OwnedFd, String> {
        if !wanted {
            return null.try_clone().map_err(|error| format!("dup: {error}"));
        }
        let (reader, writer) = io::pipe().map_err(|error| format!("pipe: {error}"))?;
        set_nonblocking(writer.as_raw_fd()).map_err(|error| format!("pipe: {error}"))?;
        own(reader.as_raw_fd(), self.uid);
        self.input.target = Some(writer.into());
        Ok(reader.into())
    }

    fn make_output(&mut self, stream: Stream) -> Result<OwnedFd, String> {
        let (reader, writer) = io::pipe().map_err(|error| format!("pipe: {error}"))?;
        set_nonblocking(reader.as_raw_fd()).map_err(|error| format!("pipe: {error}"))?;
        own(writer.as_raw_fd(), self.uid);
        self.add_output(stream, reader.into());
        Ok(writer.into())
    }

    fn add_output(&mut self, stream: Stream, source: OwnedFd) {
        self.outputs.push(Output { stream, source: Some(source), splitter: Splitter::default(), clients: Vec::new() });
    }

    /// The helper has ended: the container's pid, or why there is none.
    pub fn created(&mut self, success: bool) -> Result<Pid, String> {
        self.helper = None;
        let mut message = String::new();
        if let Some(errors) = self.helper_errors.take() {
            let _ = errors.take(8192).read_to_string(&mut message);
        }
        let pid = fs::read_to_string(self.bundle.join("pid")).ok().and_then(|text| text.trim().parse().ok());
        let (true, Some(pid)) = (success, pid) else {
            let message = message.trim();
            return Err(if message.is_empty() { "the helper failed".to_owned() } else { message.to_owned() });
        };
        if let Some(listener) = self.console.take() {
            self.receive_terminal(&listener).map_err(|error| format!("receive the terminal: {error}"))?;
            let _ = fs::remove_file(self.bundle.join("console.sock"));
        }
        self.pid = Some(Pid::from_raw(pid));
        self.state = State::Created;
        Ok(Pid::from_raw(pid))
    }

    fn receive_terminal(&mut self, listener: &UnixListener) -> io::Result<()> {
        let (socket, _) = listener.accept()?;
        let mut receiver = Receiver::default();
        receiver.receive(socket.as_raw_fd())?;
        let master = receiver.take_fds(1).and_then(|mut fds| fds.pop()).ok_or(io::ErrorKind::UnexpectedEof)?;
        set_nonblocking(master.as_raw_fd())?;
        // SAFETY: TIOCGPTPEER answers a new descriptor.
        let terminal = unsafe {
            libc::ioctl(master.as_raw_fd(), libc::TIOCGPTPEER, libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC)
        };
        if terminal >= 0 {
            // SAFETY: as above; nobody else owns it.
            let terminal = unsafe { OwnedFd::from_raw_fd(terminal) };
            own(terminal.as_raw_fd(), self.uid);
        }
        self.add_output(Stream::Stdout, master.try_clone()?);
        self.input.target = Some(master.try_clone()?);
        self.terminal = Some(master);
        Ok(())
    }

    /// Tells the waiting first process to execute its program.
    pub fn start(&mut self) -> Result<(), String> {
        let path = self.bundle.join("state/c/notify.sock");
        let here = std::env::current_dir().map_err(|error| format!("cwd: {error}"))?;
        let mut socket = UnixStream::connect(path.strip_prefix(here).unwrap_or(&path))
            .map_err(|error| format!("reach the container's first process: {error}"))?;
        socket.write_all(b"start container").map_err(|error| format!("start: {error}"))?;
        self.state = State::Starting;
        Ok(())
    }

    /// The status pipe can be read: the program executes, or the reason why not.
    pub fn started(&mut self) -> Result<u64, String> {
        let mut message = String::new();
        if let Some(status) = self.status.take() {
            let _ = status.take(8192).read_to_string(&mut message);
        }
        if !message.is_empty() {
            return Err(message);
        }
        let at = log::now();
        self.started_at = Some(at);
        self.state = State::Running;
        Ok(at)
    }

    /// Reads an output stream once. False when there is nothing more for now.
    pub fn pump(&mut self, index: usize, scratch: &mut [u8]) -> bool {
        let output = &mut self.outputs[index];
        let Some(source) = &output.source else { return false };
        match nix::unistd::read(source, scratch) {
            Ok(length) if length > 0 => {
                let bytes = &scratch[..length];
                if let Some(log) = &mut self.log {
                    let mut entries = Vec::with_capacity(length + 64);
                    output.splitter.push(output.stream, &log::timestamp(log::now()), bytes, &mut entries);
                    if !entries.is_empty() {
                        // A full disk must not stop the container; what cannot be written is lost, as upstream.
                        let _ = log.write(&entries);
                    }
                }
                for client in &mut output.clients {
                    client.unsent.extend_from_slice(bytes);
                    client.flush();
                }
                true
            }
            Err(nix::Error::EAGAIN | nix::Error::EINTR) => false,
            // The end; EIO is how a terminal says it.
            Ok(_) | Err(_) => {
                self.end_output(index);
                false
            }
        }
    }

    fn end_output(&mut self, index: usize) {
        let output = &mut self.outputs[index];
        output.source = None;
        if let Some(log) = &mut self.log {
            let mut entries = Vec::new();
            output.splitter.finish(output.stream, &log::timestamp(log::now()), &mut entries);
            let _ = log.write(&entries);
        }
        output.clients.retain_mut(|client| client.flush() && !client.unsent.is_empty());
    }

    /// Its first process has ended: what it wrote before is in the log when this returns.
    pub fn exited(&mut self, code: i32, signal: i32, scratch: &mut [u8]) -> Exit {
        for index in 0..self.outputs.len() {
            // Bounded: a child that lives on in another process-id namespace may write for ever.
            for _ in 0..1024 {
                if !self.pump(index, scratch) {
                    break;
                }
            }
            // Flush an unended line even when somebody else still holds the stream open. Attached clients that read
            // slowly still get what they have not read; they are let go by the loop.
            self.end_output(index);
        }
        self.input = Input::default();
        self.terminal = None;
        self.log = None;
        self.status = None;
        let exit = Exit { code, signal, started_at: self.started_at, finished_at: log::now() };
        self.state = State::Exited(exit);
        exit
    }

    /// Moves what attached clients send on to the container.
    pub fn feed(&mut self, client: usize, scratch: &mut [u8]) {
        match nix::unistd::read(&self.input.clients[client], scratch) {
            Ok(length) if length > 0 => {
                self.input.unsent.extend_from_slice(&scratch[..length]);
                self.flush_input();
            }
            Err(nix::Error::EAGAIN | nix::Error::EINTR) => {}
            Ok(_) | Err(_) => {
                self.input.clients.remove(client);
                if self.stdin_once && self.terminal.is_none() && self.input.unsent.is_empty() {
                    self.input.target = None;
                }
            }
        }
    }

    pub fn flush_input(&mut self) {
        let Some(target) = &self.input.target else {
            self.input.unsent.clear();
            return;
        };
        if !write_some(target, &mut self.input.unsent) {
            self.input.target = None;
        }
        if self.stdin_once && self.terminal.is_none() && self.input.unsent.is_empty() && self.input.clients.is_empty() {
            self.input.target = None;
        }
    }

    /// False while an attached client holds this stream back.
    pub fn may_read(&self, index: usize) -> bool {
        self.outputs[index].clients.iter().all(|client| client.unsent.len() < MAX_UNSENT)
    }

    pub fn reopen_log(&mut self) -> io::Result<()> {
        self.log.as_mut().map_or(Ok(()), LogFile::reopen)
    }

    pub fn report(&self) -> Report {
        Report {
            container: self.id.clone(),
            pid: self.pid.map_or(0, Pid::as_raw),
            started_at: self.started_at,
            exit: if let State::Exited(exit) = self.state { Some(exit) } else { None },
        }
    }
}

impl Sink {
    /// Sends what it can; false when the client has gone.
    pub fn flush(&mut self) -> bool {
        write_some(&self.fd, &mut self.unsent)
    }
}

fn write_some(fd: &OwnedFd, unsent: &mut Vec<u8>) -> bool {
    while !unsent.is_empty() {
        match nix::unistd::write(fd, unsent) {
            Ok(written) => drop(unsent.drain(..written)),
            Err(nix::Error::EAGAIN) => return true,
            Err(nix::Error::EINTR) => {}
            Err(_) => {
                unsent.clear();
                return false;
            }
        }
    }
    *unsent = Vec::new();
    true
}

/// In the child: arranges the descriptors and executes the agent's program. Returns only with an error.
fn run_helper(
    request: &Create,
    program: &OwnedFd,
    null: &OwnedFd,
    status: io::PipeWriter,
    errors: OwnedFd,
    streams: Vec<OwnedFd>,
    console: &str,
) -> String {
    if let Err(error) = exec::standard_streams([null, &errors, &errors]) {
        return format!("connect streams: {error}");
    }
    // Away from the numbers that are about to be filled.
    let high = |fd: i32| {
        // SAFETY: duplicates an open descriptor; the copy is closed by exec.
        unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 20) }
    };
    let program = high(program.as_raw_fd());
    let mut wanted = vec![(high(status.as_raw_fd()), HELPER_STATUS_FD)];
    for (stream, number) in streams.iter().zip([HELPER_STDIN_FD, HELPER_STDOUT_FD, HELPER_STDERR_FD]) {
        wanted.push((high(stream.as_raw_fd()), number));
    }
    for (fd, number) in wanted {
        // SAFETY: nothing in this process uses these numbers any more; it executes next.
        if unsafe { libc::dup2(fd, number) } < 0 {
            return format!("dup2: {}", io::Error::last_os_error());
        }
    }
    if let Some(adjustment) = request.oom_score_adj {
        pod::set_oom_score_adj(adjustment);
    }
    if let Err(message) = pod::join_cgroups(&request.cgroup_procs) {
        return message;
    }
    coracle_shim::reset_signals();
    let text = |value: &str| std::ffi::CString::new(value).unwrap_or_default();
    let bundle = request.bundle.to_string_lossy();
    let arguments = [text(HELPER_NAME), text(&request.container), text(&bundle), text(console)];
    let pointers =
        [arguments[0].as_ptr(), arguments[1].as_ptr(), arguments[2].as_ptr(), arguments[3].as_ptr(), std::ptr::null()];
    let environment = [std::ptr::null::<libc::c_char>()];
    // SAFETY: all strings are terminated and outlive the call.
    unsafe {
        libc::syscall(
            libc::SYS_execveat,
            program,
            c"".as_ptr(),
            pointers.as_ptr(),
            environment.as_ptr(),
            libc::AT_EMPTY_PATH,
        )
    };
    format!("execute the agent's program: {}", io::Error::last_os_error())
}

/// Lets an unprivileged program open its own streams again by name.
fn own(fd: i32, uid: u32) {
    // SAFETY: plain numbers.
    unsafe { libc::fchown(fd, uid, u32::MAX) };
}

pub fn set_nonblocking(fd: i32) -> io::Result<()> {
    // SAFETY: plain numbers on an open descriptor.
    let result = unsafe {
        let flags = libc::fcntl(fd, libc::F_GETFL);
        if flags < 0 { flags } else { libc::fcntl(fd, libc::F_SETFL, flags | libc::O_NONBLOCK) }
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
