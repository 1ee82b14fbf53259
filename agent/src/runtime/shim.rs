//! The agent's end of a pod's shim: starting one, finding one again, asking it.

use std::collections::HashMap;
use std::ffi::CString;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use coracle_shim::protocol::{
    Answer, Call, Event, Exit, Failure, FailureKind, Message, POD_FILE, PodSpec, Request, SOCKET,
};
use coracle_shim::wire::{Receiver, send_with_fds};
use parking_lot::Mutex;
use tokio::io::Interest;
use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot};

use super::RuntimeError;

/// A shim that says nothing for this long while starting is given up.
const START_PATIENCE: Duration = Duration::from_secs(20);

/// The shim's program in a sealed memory file: every shim of an agent shares its pages, and replacing the agent's
/// binary on disk does not touch those that run.
pub struct ShimProgram {
    file: File,
}

impl ShimProgram {
    pub fn new(program: &[u8]) -> io::Result<Self> {
        let name = CString::new("coracle-shim")?;
        let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
        // SAFETY: the name is terminated; the descriptor is new and owned here. MFD_EXEC (6.3) is not known to older
        // kernels, which then refuse it.
        let fd = unsafe {
            let fd = libc::memfd_create(name.as_ptr(), flags | 0x10);
            if fd >= 0 { fd } else { libc::memfd_create(name.as_ptr(), flags) }
        };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: just created.
        let mut file = unsafe { File::from_raw_fd(fd) };
        file.write_all(program)?;
        let seals = libc::F_SEAL_SEAL | libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_WRITE;
        // SAFETY: plain numbers on an open descriptor.
        if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, seals) } < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Self { file })
    }

    /// Starts a shim for the pod; it has made the pod's namespaces and listens when this returns.
    pub async fn start(&self, spec: &PodSpec) -> Result<(), RuntimeError> {
        let failed = |source| RuntimeError::Io { what: "start the pod's shim".to_owned(), source };
        let text = serde_json::to_vec(spec).map_err(|error| failed(error.into()))?;
        std::fs::write(spec.dir.join(POD_FILE), text).map_err(failed)?;
        let program = format!("/proc/self/fd/{}", self.file.as_raw_fd());
        let command = tokio::process::Command::new(program)
            .arg0("coracle-shim")
            .arg(&spec.dir)
            .env_clear()
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .output();
        // Its output ends once the shim has let go of the pipe, right behind its one line.
        let output = tokio::time::timeout(START_PATIENCE, command)
            .await
            .map_err(|_| failed(io::ErrorKind::TimedOut.into()))?
            .map_err(failed)?;
        let said = String::from_utf8_lossy(&output.stdout);
        match said.trim().split_once(' ') {
            Some(("ready", _)) => Ok(()),
            Some(("error", why)) => Err(failed(io::Error::other(why.to_owned()))),
            _ => Err(failed(io::Error::other("it ended without a word"))),
        }
    }
}

/// What a shim tells on its own.
#[derive(Debug)]
pub enum ShimEvent {
    Exit {
        container: String,
        exit: Exit,
    },
    /// The connection has ended: the shim is gone.
    Lost,
}

#[derive(Default)]
struct Waiting {
    replies: HashMap<u64, oneshot::Sender<Result<Answer, Failure>>>,
    commands: HashMap<String, oneshot::Sender<Exit>>,
    lost: bool,
}

/// A connection to a shim.
pub struct Shim {
    stream: UnixStream,
    next: AtomicU64,
    waiting: Mutex<Waiting>,
    /// One line at a time.
    writing: tokio::sync::Mutex<()>,
}

impl Shim {
    /// Connects to the shim of the pod in `folder`. Its events go to `events`, in order.
    pub async fn connect(folder: &Path, events: mpsc::UnboundedSender<ShimEvent>) -> io::Result<Arc<Self>> {
        // The path of a unix socket is short; a descriptor's is shorter.
        let folder = File::open(folder)?;
        let path = format!("/proc/self/fd/{}/{SOCKET}", folder.as_raw_fd());
        let shim = Arc::new(Self {
            stream: UnixStream::connect(path).await?,
            next: AtomicU64::new(1),
            waiting: Mutex::default(),
            writing: tokio::sync::Mutex::default(),
        });
        let reader = Arc::clone(&shim);
        tokio::spawn(async move {
            if let Err(error) = reader.read(&events).await {
                tracing::debug!(%error, "connection to a shim failed");
            }
            let mut waiting = reader.waiting.lock();
            waiting.lost = true;
            waiting.replies.clear();
            waiting.commands.clear();
            drop(waiting);
            let _ = events.send(ShimEvent::Lost);
        });
        Ok(shim)
    }

    async fn read(&self, events: &mpsc::UnboundedSender<ShimEvent>) -> io::Result<()> {
        let mut receiver = Receiver::default();
        loop {
            let open = self.stream.async_io(Interest::READABLE, || receiver.receive(self.stream.as_raw_fd())).await?;
            while let Some(line) = receiver.line() {
                match serde_json::from_slice(&line)? {
                    Message::Reply { id, result } => {
                        if let Some(waiting) = self.waiting.lock().replies.remove(&id) {
                            let _ = waiting.send(result);
                        }
                    }
                    Message::Event(Event::Exit { container, exit }) => {
                        let _ = events.send(ShimEvent::Exit { container, exit });
                    }
                    Message::Event(Event::ExecExit { exec, exit }) => {
                        if let Some(waiting) = self.waiting.lock().commands.remove(&exec) {
                            let _ = waiting.send(exit);
                        }
                    }
                }
            }
            if !open {
                return Ok(());
            }
        }
    }

    /// Asks, and waits for the answer.
    pub async fn call(&self, request: Request, fds: Vec<OwnedFd>) -> Result<Answer, CallError> {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let (sender, receiver) = oneshot::channel();
        {
            let mut waiting = self.waiting.lock();
            if waiting.lost {
                return Err(CallError::Gone(io::ErrorKind::NotConnected.into()));
            }
            waiting.replies.insert(id, sender);
        }
        let mut line =
            serde_json::to_vec(&Call { id, fds: fds.len(), request }).map_err(|error| CallError::Gone(error.into()))?;
        line.push(b'\n');
        if let Err(error) = self.write(&line, &fds).await {
            self.waiting.lock().replies.remove(&id);
            return Err(CallError::Gone(error));
        }
        drop(fds);
        match receiver.await {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(failure)) => Err(CallError::Refused(failure)),
            Err(_) => Err(CallError::Gone(io::ErrorKind::ConnectionReset.into())),
        }
    }

    async fn write(&self, line: &[u8], fds: &[OwnedFd]) -> io::Result<()> {
        let _one = self.writing.lock().await;
        let mut sent = 0;
        while sent < line.len() {
            let fds = if sent == 0 { fds } else { &[] };
            sent += self
                .stream
                .async_io(Interest::WRITABLE, || send_with_fds(self.stream.as_raw_fd(), &line[sent..], fds))
                .await?;
        }
        Ok(())
    }

    /// Will get the end of the command `exec`. Ask before starting it.
    pub fn expect_exit(&self, exec: &str) -> oneshot::Receiver<Exit> {
        let (sender, receiver) = oneshot::channel();
        self.waiting.lock().commands.insert(exec.to_owned(), sender);
        receiver
    }

    pub fn forget_exit(&self, exec: &str) {
        self.waiting.lock().commands.remove(exec);
    }
}

/// Why a call brought no answer.
#[derive(Debug)]
pub enum CallError {
    /// The shim says no.
    Refused(Failure),
    /// Nobody is there.
    Gone(io::Error),
}

impl CallError {
    /// The text of the refusal, or of the broken connection.
    pub fn message(&self) -> String {
        match self {
            CallError::Refused(failure) => failure.message.clone(),
            CallError::Gone(error) => format!("the pod's shim is gone: {error}"),
        }
    }
}

impl From<CallError> for RuntimeError {
    fn from(error: CallError) -> Self {
        match error {
            CallError::Refused(failure) if failure.kind == FailureKind::Failed => RuntimeError::Start(failure.message),
            CallError::Refused(failure) => RuntimeError::WrongState(failure.message),
            CallError::Gone(error) => RuntimeError::Shim(error),
        }
    }
}
