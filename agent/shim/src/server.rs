//! The one loop: requests from agents, output of containers, ends of processes.

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};

use coracle_shim::protocol::{Answer, Call, Event, Exit, Failure, FailureKind, Message, Request, SOCKET, VERSION};
use coracle_shim::wire::{MAX_LINE, Receiver};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use crate::container::{Container, Sink, State, set_nonblocking};
use crate::{exec, log};

/// Bytes read from a stream at once.
const SCRATCH: usize = 16 * 1024;

struct Client {
    id: u64,
    socket: UnixStream,
    receiver: Receiver,
    unsent: Vec<u8>,
    gone: bool,
}

/// A command that runs in a container.
struct Command {
    exec: String,
    pid: Pid,
    started_at: u64,
}

pub struct Server {
    listener: UnixListener,
    signals: SignalFd,
    clients: Vec<Client>,
    next_client: u64,
    containers: Vec<Container>,
    commands: Vec<Command>,
    /// Init of the shared process-id namespace.
    init: Option<Pid>,
    /// Ends of processes that nobody knew: a container may die before its helper told its pid.
    strangers: Vec<(Pid, i32, i32)>,
    scratch: Vec<u8>,
    shutdown: bool,
}

/// What a descriptor in the poll set belongs to.
#[derive(Debug, Clone, Copy)]
enum Source {
    Listener,
    Signals,
    Client(usize),
    Status(usize),
    Output(usize, usize),
    OutputClient(usize, usize, usize),
    Input(usize),
    InputClient(usize, usize),
}

impl Server {
    pub fn new(init: Option<Pid>) -> io::Result<Self> {
        let mut mask = SigSet::empty();
        mask.add(Signal::SIGCHLD);
        mask.thread_block()?;
        // A client that went away is noticed by the failing write.
        let mut ignored = SigSet::empty();
        ignored.add(Signal::SIGPIPE);
        ignored.thread_block()?;
        let signals = SignalFd::with_flags(&mask, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)?;
        let _ = fs::remove_file(SOCKET);
        let listener = UnixListener::bind(SOCKET)?;
        listener.set_nonblocking(true)?;
        Ok(Self {
            listener,
            signals,
            clients: Vec::new(),
            next_client: 1,
            containers: Vec::new(),
            commands: Vec::new(),
            init,
            strangers: Vec::new(),
            scratch: vec![0; SCRATCH],
            shutdown: false,
        })
    }

    pub fn run(mut self) {
        while !self.shutdown || self.clients.iter().any(|client| !client.unsent.is_empty() && !client.gone) {
            let ready = match self.wait() {
                Ok(ready) => ready,
                Err(nix::Error::EINTR) => continue,
                Err(_) => return,
            };
            for (source, flags) in ready {
                self.handle(source, flags);
            }
            self.reap();
            self.clients.retain(|client| !client.gone);
        }
    }

    /// Waits for something to do. Descriptors are handled from last to first, so that indexes stay valid when one of
    /// several attached clients is removed.
    fn wait(&self) -> nix::Result<Vec<(Source, PollFlags)>> {
        let (read, write) = (PollFlags::POLLIN, PollFlags::POLLOUT);
        let mut set: Vec<(Source, BorrowedFd<'_>, PollFlags)> =
            vec![(Source::Signals, self.signals.as_fd(), read), (Source::Listener, self.listener.as_fd(), read)];
        for (index, client) in self.clients.iter().enumerate() {
            let flags = if client.unsent.is_empty() { read } else { read | write };
            set.push((Source::Client(index), client.socket.as_fd(), flags));
        }
        for (number, container) in self.containers.iter().enumerate() {
            if let (State::Starting, Some(status)) = (container.state, &container.status) {
                set.push((Source::Status(number), status.as_fd(), read));
            }
            for (index, output) in container.outputs.iter().enumerate() {
                for (place, client) in output.clients.iter().enumerate() {
                    let flags = if client.unsent.is_empty() { PollFlags::empty() } else { write };
                    set.push((Source::OutputClient(number, index, place), client.fd.as_fd(), flags));
                }
                if let (Some(source), true) = (&output.source, container.may_read(index)) {
                    set.push((Source::Output(number, index), source.as_fd(), read));
                }
            }
            if let (Some(target), false) = (&container.input.target, container.input.unsent.is_empty()) {
                set.push((Source::Input(number), target.as_fd(), write));
            } else {
                for (place, client) in container.input.clients.iter().enumerate() {
                    set.push((Source::InputClient(number, place), client.as_fd(), read));
                }
            }
        }
        let mut fds: Vec<PollFd<'_>> = set.iter().map(|(_, fd, flags)| PollFd::new(*fd, *flags)).collect();
        poll(&mut fds, PollTimeout::NONE)?;
        let ready = set.iter().zip(&fds).rev().filter_map(|((source, ..), fd)| {
            let flags = fd.revents()?;
            (!flags.is_empty()).then_some((*source, flags))
        });
        Ok(ready.collect())
    }

    fn handle(&mut self, source: Source, flags: PollFlags) {
        match source {
            Source::Signals => while matches!(self.signals.read_signal(), Ok(Some(_))) {},
            Source::Listener => self.accept(),
            Source::Client(index) => self.serve(index, flags),
            Source::Status(number) => self.started(number),
            Source::Output(number, index) => {
                self.containers[number].pump(index, &mut self.scratch);
            }
            Source::OutputClient(number, index, place) => {
                let output = &mut self.containers[number].outputs[index];
                let lost = flags.intersects(PollFlags::POLLERR | PollFlags::POLLHUP);
                let ended = output.source.is_none();
                if let Some(client) = output.clients.get_mut(place)
                    && (lost || !client.flush() || (ended && client.unsent.is_empty()))
                {
                    output.clients.remove(place);
                }
            }
            Source::Input(number) => self.containers[number].flush_input(),
            Source::InputClient(number, place) => {
                if place < self.containers[number].input.clients.len() {
                    self.containers[number].feed(place, &mut self.scratch);
                }
            }
        }
    }

    fn accept(&mut self) {
        while let Ok((socket, _)) = self.listener.accept() {
            if socket.set_nonblocking(true).is_err() {
                continue;
            }
            let id = self.next_client;
            self.next_client += 1;
            self.clients.push(Client { id, socket, receiver: Receiver::default(), unsent: Vec::new(), gone: false });
        }
    }

    fn serve(&mut self, index: usize, flags: PollFlags) {
        if flags.contains(PollFlags::POLLOUT) {
            self.clients[index].flush();
        }
        loop {
            let client = &mut self.clients[index];
            match client.receiver.receive(client.socket.as_raw_fd()) {
                Ok(true) => {}
                Ok(false) => client.gone = true,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(_) => client.gone = true,
            }
            while let Some(line) = self.clients[index].receiver.line() {
                self.call(index, &line);
            }
            if self.clients[index].gone {
                return;
            }
        }
    }

    fn call(&mut self, index: usize, line: &[u8]) {
        let client = &mut self.clients[index];
        let Ok(call) = serde_json::from_slice::<Call>(line) else {
            // Without an id there is nothing to answer to; with a guess at its descriptors all later ones are wrong.
            client.gone = true;
            return;
        };
        let Some(fds) = client.receiver.take_fds(call.fds) else {
            client.gone = true;
            return;
        };
        let (client, id) = (client.id, call.id);
        if let Some(result) = self.answer(client, id, call.request, fds) {
            self.reply(client, id, result);
        }
    }

    /// Does what is asked; `None` when the reply comes later.
    fn answer(
        &mut self,
        client: u64,
        id: u64,
        request: Request,
        mut fds: Vec<OwnedFd>,
    ) -> Option<Result<Answer, Failure>> {
        Some(match request {
            Request::Hello => Ok(Answer {
                pid: Some(std::process::id() as i32),
                version: Some(VERSION),
                containers: self.containers.iter().map(Container::report).collect(),
                at: Some(log::now()),
            }),
            Request::Create(create) => {
                if self.containers.iter().any(|container| container.id == create.container) {
                    return Some(Err(failure(FailureKind::WrongState, "the container exists")));
                }
                let Some(program) = fds.pop() else {
                    return Some(Err(failure(FailureKind::Failed, "no program")));
                };
                match Container::create(create, program) {
                    Ok(mut container) => {
                        container.waiting = Some((client, id));
                        self.containers.push(container);
                        return None;
                    }
                    Err(message) => Err(failure(FailureKind::Failed, message)),
                }
            }
            Request::Start { container } => match self.find(&container) {
                Ok(container) if container.state == State::Created => match container.start() {
                    Ok(()) => {
                        container.waiting = Some((client, id));
                        return None;
                    }
                    Err(message) => Err(failure(FailureKind::Failed, message)),
                },
                Ok(_) => Err(failure(FailureKind::WrongState, "the container is not waiting to be started")),
                Err(error) => Err(error),
            },
            Request::Kill { container, signal } => {
                self.find(&container).and_then(|container| match (container.state, container.pid) {
                    (State::Created | State::Starting | State::Running, Some(pid)) => send_signal(pid, signal),
                    _ => Err(failure(FailureKind::WrongState, "the container does not run")),
                })
            }
            Request::Exec(request) => self.exec(&request, fds),
            Request::KillExec { exec, signal } => {
                match self.commands.iter().find(|command| command.exec == exec) {
                    Some(command) => {
                        // It leads its own session and process group: what it started goes with it.
                        let _ = send_signal(Pid::from_raw(-command.pid.as_raw()), signal);
                        send_signal(command.pid, signal)
                    }
                    None => Err(failure(FailureKind::NotFound, "no such command")),
                }
            }
            Request::Attach { container, stdin, stdout, stderr } => {
                self.find(&container).and_then(|container| attach(container, [stdin, stdout, stderr], fds))
            }
            Request::Resize { container, width, height } => {
                self.find(&container).and_then(|container| resize(container, width, height))
            }
            Request::ReopenLog { container } => self.find(&container).and_then(|container| {
                container
                    .reopen_log()
                    .map(|()| Answer::default())
                    .map_err(|error| failure(FailureKind::Failed, format!("reopen log: {error}")))
            }),
            Request::Forget { container } => match self.find(&container) {
                Ok(found) if matches!(found.state, State::Exited(_)) => {
                    self.containers.retain(|other| other.id != container);
                    let _ = fs::remove_file(format!("{container}.exit"));
                    Ok(Answer::default())
                }
                Ok(_) => Err(failure(FailureKind::WrongState, "the container still runs")),
                Err(error) => Err(error),
            },
            Request::Shutdown => {
                if self.containers.iter().any(|container| !matches!(container.state, State::Exited(_))) {
                    Err(failure(FailureKind::WrongState, "a container still runs"))
                } else {
                    if let Some(init) = self.init {
                        let _ = kill(init, Signal::SIGKILL);
                    }
                    self.shutdown = true;
                    Ok(Answer::default())
                }
            }
        })
    }

    fn find(&mut self, id: &str) -> Result<&mut Container, Failure> {
        self.containers
            .iter_mut()
            .find(|container| container.id == id)
            .ok_or_else(|| failure(FailureKind::NotFound, "no such container"))
    }

    fn exec(&mut self, request: &coracle_shim::protocol::Exec, fds: Vec<OwnedFd>) -> Result<Answer, Failure> {
        let container = self.find(&request.container)?;
        let (State::Running, Some(init)) = (container.state, container.pid) else {
            return Err(failure(FailureKind::WrongState, "container is not running"));
        };
        let pid = exec::run(request, init, fds).map_err(|message| failure(FailureKind::Failed, message))?;
        let started_at = log::now();
        self.commands.push(Command { exec: request.exec.clone(), pid, started_at });
        Ok(Answer { pid: Some(pid.as_raw()), at: Some(started_at), ..Answer::default() })
    }

    fn started(&mut self, number: usize) {
        let container = &mut self.containers[number];
        let waiting = container.waiting.take();
        let result = match container.started() {
            // An exit that was reaped in the same round is reported right behind the reply.
            Ok(at) => Ok(Answer { at: Some(at), pid: container.pid.map(Pid::as_raw), ..Answer::default() }),
            Err(message) => Err(failure(FailureKind::Failed, message)),
        };
        if let Some((client, id)) = waiting {
            self.reply(client, id, result);
        }
    }

    /// Collects every process that has ended.
    fn reap(&mut self) {
        loop {
            let (pid, code, signal) = match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::Exited(pid, code)) => (pid, code, 0),
                Ok(WaitStatus::Signaled(pid, signal, _)) => (pid, 128 + signal as i32, signal as i32),
                Ok(WaitStatus::StillAlive) | Err(nix::Error::ECHILD) => break,
                Ok(_) | Err(_) => continue,
            };
            self.ended(pid, code, signal);
        }
        if self.containers.iter().all(|container| container.helper.is_none()) {
            self.strangers.clear();
        }
    }

    fn ended(&mut self, pid: Pid, code: i32, signal: i32) {
        if let Some(number) = self.containers.iter().position(|container| container.helper == Some(pid)) {
            self.created(number, code == 0);
        } else if let Some(number) = self
            .containers
            .iter()
            .position(|container| container.pid == Some(pid) && !matches!(container.state, State::Exited(_)))
        {
            self.exited(number, code, signal);
        } else if let Some(place) = self.commands.iter().position(|command| command.pid == pid) {
            let command = self.commands.remove(place);
            let exit = Exit { code, signal, started_at: Some(command.started_at), finished_at: log::now() };
            self.broadcast(&Event::ExecExit { exec: command.exec, exit });
        } else if self.containers.iter().any(|container| container.helper.is_some()) {
            self.strangers.push((pid, code, signal));
        }
    }

    fn created(&mut self, number: usize, success: bool) {
        let container = &mut self.containers[number];
        let waiting = container.waiting.take();
        let result = container.created(success);
        let mut early = None;
        let reply = match result {
            Ok(pid) => {
                early =
                    self.strangers.iter().position(|stranger| stranger.0 == pid).map(|at| self.strangers.remove(at));
                Ok(Answer { pid: Some(pid.as_raw()), at: Some(log::now()), ..Answer::default() })
            }
            Err(message) => {
                self.containers.remove(number);
                Err(failure(FailureKind::Failed, message))
            }
        };
        if let Some((client, id)) = waiting {
            self.reply(client, id, reply);
        }
        if let Some((_, code, signal)) = early {
            self.exited(number, code, signal);
        }
    }

    fn exited(&mut self, number: usize, code: i32, signal: i32) {
        if self.containers[number].state == State::Starting {
            // A program that ended at once: answer its start before its end.
            self.started(number);
        }
        let container = &mut self.containers[number];
        let exit = container.exited(code, signal, &mut self.scratch);
        let id = container.id.clone();
        if let Ok(text) = serde_json::to_vec(&exit) {
            let temporary = format!(".{id}.exit");
            let _ = fs::write(&temporary, text).and_then(|()| fs::rename(&temporary, format!("{id}.exit")));
        }
        self.broadcast(&Event::Exit { container: id, exit });
    }

    fn reply(&mut self, client: u64, id: u64, result: Result<Answer, Failure>) {
        if let Some(client) = self.clients.iter_mut().find(|other| other.id == client) {
            client.send(&Message::Reply { id, result });
        }
    }

    fn broadcast(&mut self, event: &Event) {
        for client in &mut self.clients {
            client.send(&Message::Event(event.clone()));
        }
    }
}

impl Client {
    fn send(&mut self, message: &Message) {
        if let Ok(mut line) = serde_json::to_vec(message) {
            line.push(b'\n');
            self.unsent.extend_from_slice(&line);
        }
        // Nobody reads: an agent that comes back asks for the state anyway.
        self.gone |= self.unsent.len() > MAX_LINE;
        self.flush();
    }

    fn flush(&mut self) {
        while !self.unsent.is_empty() {
            match nix::unistd::write(&self.socket, &self.unsent) {
                Ok(written) => drop(self.unsent.drain(..written)),
                Err(nix::Error::EAGAIN) => return,
                Err(nix::Error::EINTR) => {}
                Err(_) => {
                    self.gone = true;
                    self.unsent.clear();
                }
            }
        }
    }
}

fn attach(container: &mut Container, wanted: [bool; 3], fds: Vec<OwnedFd>) -> Result<Answer, Failure> {
    if !matches!(container.state, State::Created | State::Starting | State::Running) {
        return Err(failure(FailureKind::WrongState, "container is not running"));
    }
    if fds.len() != wanted.iter().filter(|wanted| **wanted).count() {
        return Err(failure(FailureKind::Failed, "wrong number of descriptors"));
    }
    let mut fds = fds.into_iter();
    if wanted[0]
        && let Some(fd) = fds.next()
    {
        if container.input.target.is_none() {
            return Err(failure(FailureKind::WrongState, "the container has no open standard input"));
        }
        let _ = set_nonblocking(fd.as_raw_fd());
        container.input.clients.push(fd);
    }
    for (wanted, stream) in [(wanted[1], log::Stream::Stdout), (wanted[2], log::Stream::Stderr)] {
        if wanted && let Some(fd) = fds.next() {
            let _ = set_nonblocking(fd.as_raw_fd());
            if let Some(output) = container.outputs.iter_mut().find(|output| output.stream == stream) {
                output.clients.push(Sink { fd, unsent: Vec::new() });
            }
        }
    }
    Ok(Answer::default())
}

fn resize(container: &mut Container, width: u16, height: u16) -> Result<Answer, Failure> {
    let Some(terminal) = &container.terminal else {
        return Err(failure(FailureKind::WrongState, "the container has no terminal"));
    };
    let size = libc::winsize { ws_row: height, ws_col: width, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: the size outlives the call.
    if unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCSWINSZ, &size) } < 0 {
        return Err(failure(FailureKind::Failed, format!("resize: {}", io::Error::last_os_error())));
    }
    Ok(Answer::default())
}

fn send_signal(pid: Pid, signal: i32) -> Result<Answer, Failure> {
    // SAFETY: kill(2) with plain numbers; real-time signals have no name in the enum.
    if unsafe { libc::kill(pid.as_raw(), signal) } < 0 {
        let error = io::Error::last_os_error();
        if error.raw_os_error() != Some(libc::ESRCH) {
            return Err(failure(FailureKind::Failed, format!("kill: {error}")));
        }
    }
    Ok(Answer::default())
}

fn failure(kind: FailureKind, message: impl Into<String>) -> Failure {
    Failure { kind, message: message.into() }
}
