//! Streams into containers: commands, attached clients, forwarded ports.

use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use coracle_shim::protocol::{Exec, Exit, Request};
use coracle_shim::wire::Receiver;
use tokio::io::{AsyncRead, AsyncReadExt, ReadBuf};
use tokio::net::unix::pipe;
use tokio::sync::{mpsc, oneshot};

use super::embedded::{Embedded, no_sandbox, step};
use super::record::{self, ContainerRecord};
use super::shim::Shim;
use super::{
    AttachRequest, BoxRead, BoxWrite, ExecRequest, ExecSyncResponse, NamespaceMode, RuntimeError, RuntimeResult,
    StreamSession, TerminalSize,
};
use std::sync::Arc;

/// More output of a command than this is thrown away (`exec_sync`).
const MAX_OUTPUT: usize = 16 << 20;

/// After a command's end its output is waited for so long: something it left behind may hold the streams open.
const DRAIN: Duration = Duration::from_millis(500);

/// A command that runs; dropping it kills it.
struct Running {
    shim: Arc<Shim>,
    exec: String,
    exit: Option<oneshot::Receiver<Exit>>,
}

impl Running {
    async fn wait(&mut self) -> RuntimeResult<i32> {
        let Some(receiver) = self.exit.as_mut() else { return Err(gone()) };
        let exit = receiver.await;
        self.exit = None;
        exit.map(|exit| exit.code).map_err(|_| gone())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if self.exit.is_some() {
            let (shim, exec) = (Arc::clone(&self.shim), self.exec.clone());
            shim.forget_exit(&exec);
            if let Ok(runtime) = tokio::runtime::Handle::try_current() {
                runtime.spawn(async move {
                    let _ = shim.call(Request::KillExec { exec, signal: libc::SIGKILL }, Vec::new()).await;
                });
            }
        }
    }
}

fn gone() -> RuntimeError {
    RuntimeError::Shim(io::ErrorKind::ConnectionReset.into())
}

impl Embedded {
    /// Has the shim execute a command.
    async fn execute_command(
        &self,
        id: &str,
        command: &[String],
        tty: bool,
        fds: Vec<OwnedFd>,
    ) -> RuntimeResult<Running> {
        let (record, shim) = self.shim_of(id)?;
        let request = self.exec_request(&record, command, tty);
        let exec = request.exec.clone();
        let mut running = Running { exit: Some(shim.expect_exit(&exec)), shim, exec };
        let answer = running.shim.call(Request::Exec(Box::new(request)), fds).await;
        if let Err(error) = answer {
            running.exit = None;
            running.shim.forget_exit(&running.exec);
            return Err(error.into());
        }
        Ok(running)
    }

    fn exec_request(&self, record: &ContainerRecord, command: &[String], tty: bool) -> Exec {
        let template = &record.exec;
        let mut env = template.env.clone();
        if tty && !env.iter().any(|variable| variable.starts_with("TERM=")) {
            env.push("TERM=xterm".to_owned());
        }
        Exec {
            exec: record::new_id(),
            container: record.id.clone(),
            args: command.to_vec(),
            env,
            cwd: template.cwd.clone(),
            uid: record.user.uid,
            gid: record.user.gid,
            groups: record.user.groups.clone(),
            tty,
            capabilities: template.capabilities,
            no_new_privileges: template.no_new_privileges,
            rlimits: template.rlimits.clone(),
            seccomp: template.seccomp.then(|| self.container_dir(record).join("seccomp.bpf")),
            oom_score_adj: record.config.linux.resources.oom_score_adj.and_then(|value| i32::try_from(value).ok()),
            cgroup_procs: self.inner.cgroups.procs(&record.cgroup),
        }
    }

    pub(super) async fn run_command(
        &self,
        id: &str,
        command: &[String],
        timeout: Option<Duration>,
    ) -> RuntimeResult<ExecSyncResponse> {
        let (stdout, stdout_fd) = output_pipe()?;
        let (stderr, stderr_fd) = output_pipe()?;
        let fds = vec![null()?, stdout_fd, stderr_fd];
        let mut running = self.execute_command(id, command, false, fds).await?;
        let (mut out, mut err) = (Vec::new(), Vec::new());
        let work = async {
            let mut output = Box::pin(async { tokio::join!(collect(stdout, &mut out), collect(stderr, &mut err)) });
            let code = tokio::select! {
                code = running.wait() => {
                    let _ = tokio::time::timeout(DRAIN, output).await;
                    code
                }
                // Closed streams do not mean the end of the command.
                _ = &mut output => running.wait().await,
            };
            code
        };
        let code = match timeout.filter(|timeout| !timeout.is_zero()) {
            Some(timeout) => tokio::time::timeout(timeout, work)
                .await
                .map_err(|_| RuntimeError::Timeout { command: command.join(" ") })?,
            None => work.await,
        }?;
        Ok(ExecSyncResponse { stdout: out, stderr: err, exit_code: code })
    }

    pub(super) async fn start_command(&self, request: &ExecRequest) -> RuntimeResult<StreamSession> {
        if request.tty {
            return self.start_terminal(request).await;
        }
        let (mut stdin, mut stdout, mut stderr): (Option<BoxWrite>, Option<BoxRead>, Option<BoxRead>) =
            (None, None, None);
        let stdin_fd = if request.stdin {
            let (writer, fd) = input_pipe()?;
            stdin = Some(Box::pin(writer));
            fd
        } else {
            null()?
        };
        let mut fds = vec![stdin_fd];
        for (wanted, slot) in [(request.stdout, &mut stdout), (request.stderr, &mut stderr)] {
            if wanted {
                let (reader, fd) = output_pipe()?;
                *slot = Some(Box::pin(reader));
                fds.push(fd);
            } else {
                fds.push(null()?);
            }
        }
        let mut running = self.execute_command(&request.container_id, &request.command, false, fds).await?;
        let (resize, _) = mpsc::channel(1);
        Ok(StreamSession { stdin, stdout, stderr, resize, exit: Box::pin(async move { running.wait().await }) })
    }

    async fn start_terminal(&self, request: &ExecRequest) -> RuntimeResult<StreamSession> {
        let (ours, theirs) = UnixStream::pair().map_err(step("make a socket pair"))?;
        let mut running =
            self.execute_command(&request.container_id, &request.command, true, vec![theirs.into()]).await?;
        let mut receiver = Receiver::default();
        // The master was sent before the command executed, so it is there.
        receiver.receive(ours.as_raw_fd()).map_err(step("receive the terminal"))?;
        let master = receiver.take_fds(1).and_then(|mut fds| fds.pop()).ok_or_else(gone)?;
        let (resize, sizes) = mpsc::channel(4);
        let (reader, writer) = terminal_streams(&master).map_err(step("open the terminal"))?;
        let exit = async move {
            let follow = follow_sizes(sizes, move |size| set_size(&master, size));
            tokio::select! {
                code = running.wait() => code,
                never = follow => match never {},
            }
        };
        Ok(StreamSession {
            stdin: request.stdin.then_some(writer),
            stdout: Some(reader),
            stderr: None,
            resize,
            exit: Box::pin(exit),
        })
    }

    pub(super) async fn attach_streams(&self, request: &AttachRequest) -> RuntimeResult<StreamSession> {
        let id = request.container_id.clone();
        let (record, shim) = self.shim_of(&id)?;
        let (mut stdin, mut stdout, mut stderr): (Option<BoxWrite>, Option<BoxRead>, Option<BoxRead>) =
            (None, None, None);
        let mut fds = Vec::new();
        // Without a standard input of its own there is nothing to attach to.
        let wants_stdin = request.stdin && (record.config.stdin || record.config.tty);
        if wants_stdin {
            let (writer, fd) = input_pipe()?;
            stdin = Some(Box::pin(writer));
            fds.push(fd);
        }
        let wants_stderr = request.stderr && !record.config.tty;
        for (wanted, slot) in [(request.stdout, &mut stdout), (wants_stderr, &mut stderr)] {
            if wanted {
                let (reader, fd) = output_pipe()?;
                *slot = Some(Box::pin(reader));
                fds.push(fd);
            }
        }
        let call =
            Request::Attach { container: id.clone(), stdin: wants_stdin, stdout: request.stdout, stderr: wants_stderr };
        shim.call(call, fds).await?;
        let mut ended = {
            let state = self.inner.state.lock();
            state.containers.get(&id).map(|container| container.ended.subscribe()).ok_or_else(gone)?
        };
        let (resize, mut sizes) = mpsc::channel::<TerminalSize>(4);
        let this = self.clone();
        let exit = async move {
            let sizes = async {
                while let Some(size) = sizes.recv().await {
                    let call = Request::Resize { container: id.clone(), width: size.width, height: size.height };
                    let _ = shim.call(call, Vec::new()).await;
                }
                std::future::pending::<()>().await;
            };
            tokio::select! {
                _ = ended.wait_for(|ended| *ended) => {}
                () = sizes => {}
            }
            let record = this.record(&id)?;
            Ok(record.end.map_or(0, |end| end.exit.code))
        };
        Ok(StreamSession { stdin, stdout, stderr, resize, exit: Box::pin(exit) })
    }

    pub(super) async fn connect_to_port(&self, sandbox: &str, port: u16) -> RuntimeResult<tokio::net::TcpStream> {
        let host = {
            let state = self.inner.state.lock();
            let found = state.sandboxes.get(sandbox).ok_or_else(|| no_sandbox(sandbox))?;
            if !found.ready {
                return Err(RuntimeError::WrongState(format!("sandbox container {sandbox:?} is not running")));
            }
            found.record.config.linux.namespace_options.network == NamespaceMode::Node
        };
        let namespace = self.sandbox_dir(sandbox).join("ns/net");
        let (sender, receiver) = oneshot::channel();
        // A worker of tokio must never change its namespace; a thread of its own may, and ends.
        let work = move || {
            let connect = || -> io::Result<std::net::TcpStream> {
                if !host {
                    let file = std::fs::File::open(namespace)?;
                    nix::sched::setns(file, nix::sched::CloneFlags::CLONE_NEWNET)?;
                }
                let timeout = Duration::from_secs(10);
                std::net::TcpStream::connect_timeout(&([127, 0, 0, 1], port).into(), timeout).or_else(|first| {
                    let address = (std::net::Ipv6Addr::LOCALHOST, port).into();
                    std::net::TcpStream::connect_timeout(&address, timeout).map_err(|_| first)
                })
            };
            let _ = sender.send(connect());
        };
        std::thread::Builder::new()
            .name("port-forward".to_owned())
            .stack_size(128 * 1024)
            .spawn(work)
            .map_err(step("start a thread"))?;
        let stream = receiver.await.unwrap_or_else(|_| Err(io::ErrorKind::BrokenPipe.into()));
        let stream = stream.map_err(step(format!("failed to connect to localhost:{port} inside namespace")))?;
        stream.set_nonblocking(true).map_err(step("use the connection"))?;
        tokio::net::TcpStream::from_std(stream).map_err(step("use the connection"))
    }
}

/// Reads to the end, keeping at most [`MAX_OUTPUT`].
async fn collect(mut stream: pipe::Receiver, into: &mut Vec<u8>) {
    let mut chunk = vec![0; 16 * 1024];
    while let Ok(length) = stream.read(&mut chunk).await {
        if length == 0 {
            return;
        }
        let room = MAX_OUTPUT - into.len();
        into.extend_from_slice(&chunk[..length.min(room)]);
    }
}

fn output_pipe() -> RuntimeResult<(pipe::Receiver, OwnedFd)> {
    let (reader, writer) = io::pipe().map_err(step("make a pipe"))?;
    Ok((pipe::Receiver::from_owned_fd(reader.into()).map_err(step("make a pipe"))?, writer.into()))
}

fn input_pipe() -> RuntimeResult<(pipe::Sender, OwnedFd)> {
    let (reader, writer) = io::pipe().map_err(step("make a pipe"))?;
    Ok((pipe::Sender::from_owned_fd(writer.into()).map_err(step("make a pipe"))?, reader.into()))
}

fn null() -> RuntimeResult<OwnedFd> {
    let file = std::fs::File::options().read(true).write(true).open("/dev/null");
    Ok(file.map_err(step("open /dev/null"))?.into())
}

/// Reading and writing ends of a terminal's master.
fn terminal_streams(master: &OwnedFd) -> io::Result<(BoxRead, BoxWrite)> {
    // SAFETY: plain numbers on an open descriptor; the flag is shared by all duplicates, which is wanted.
    let result = unsafe {
        let flags = libc::fcntl(master.as_raw_fd(), libc::F_GETFL);
        libc::fcntl(master.as_raw_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK)
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    let reader = pipe::Receiver::from_owned_fd_unchecked(duplicate(master)?)?;
    let writer = pipe::Sender::from_owned_fd_unchecked(duplicate(master)?)?;
    Ok((Box::pin(TerminalReader(reader)), Box::pin(writer)))
}

fn duplicate(fd: &OwnedFd) -> io::Result<OwnedFd> {
    // SAFETY: a new descriptor, owned by nobody else.
    let copy = unsafe { libc::fcntl(fd.as_fd().as_raw_fd(), libc::F_DUPFD_CLOEXEC, 3) };
    if copy < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: as above.
    Ok(unsafe { OwnedFd::from_raw_fd(copy) })
}

/// A terminal says its end by EIO.
struct TerminalReader(pipe::Receiver);

impl AsyncRead for TerminalReader {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match Pin::new(&mut self.0).poll_read(context, buffer) {
            Poll::Ready(Err(error)) if error.raw_os_error() == Some(libc::EIO) => Poll::Ready(Ok(())),
            other => other,
        }
    }
}

/// Applies sizes as they come, for ever.
async fn follow_sizes(
    mut sizes: mpsc::Receiver<TerminalSize>,
    apply: impl Fn(TerminalSize),
) -> std::convert::Infallible {
    while let Some(size) = sizes.recv().await {
        apply(size);
    }
    std::future::pending().await
}

fn set_size(master: &OwnedFd, size: TerminalSize) {
    let size = libc::winsize { ws_row: size.height, ws_col: size.width, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: the size outlives the call.
    unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCSWINSZ, &size) };
}
