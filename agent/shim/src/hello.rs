//! The program of the built-in image `coracle.local/hello`: a web server that says which pod answers, and a few
//! basics under their own names, for machines without any other image.
//!
//! `hello [port]`, `true`, `false`, `sleep SECONDS`, `cat [FILE...]`, `echo [-n] [TEXT...]`, `env`, `hostname`, `id`,
//! `ls [PATH]`, `pwd`, `wget URL`.

use std::env;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::net::{Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::exit;
use std::thread;
use std::time::Duration;

/// Longest request head that is read before the answer.
const MAX_HEAD: usize = 16 * 1024;

/// How many callers are answered at once.
const MAX_CALLERS: usize = 64;

fn main() {
    let mut arguments = env::args();
    let called = arguments.next().unwrap_or_default();
    let mut name = Path::new(&called).file_name().map_or(String::new(), |name| name.to_string_lossy().into_owned());
    let mut rest: Vec<String> = arguments.collect();
    if matches!(name.as_str(), "hello" | "coracle-hello")
        && rest.first().is_some_and(|word| word.parse::<u16>().is_err())
    {
        name = rest.remove(0);
    }
    // Process 1 has no default signal handling: without this, stopping the pod would take its whole grace period.
    for signal in [libc::SIGTERM, libc::SIGINT] {
        // SAFETY: the handler only calls _exit, which is async-signal-safe.
        unsafe { libc::signal(signal, end as extern "C" fn(libc::c_int) as libc::sighandler_t) };
    }
    if let Err(error) = run(&name, &rest) {
        eprintln!("{name}: {error}");
        exit(1);
    }
}

extern "C" fn end(signal: libc::c_int) {
    // SAFETY: async-signal-safe. Being asked to stop is this server's normal end.
    unsafe { libc::_exit(if signal == libc::SIGTERM { 0 } else { 128 + signal }) }
}

fn run(name: &str, rest: &[String]) -> io::Result<()> {
    let mut out = io::stdout().lock();
    match name {
        "hello" | "coracle-hello" | "" => {
            drop(out);
            serve(rest.first().and_then(|port| port.parse().ok()).unwrap_or(8080))
        }
        "true" => Ok(()),
        "false" => exit(1),
        "sleep" => sleep(rest),
        "cat" => cat(rest, &mut out),
        "echo" => match rest.split_first() {
            Some((first, text)) if first == "-n" => write!(out, "{}", text.join(" ")),
            _ => writeln!(out, "{}", rest.join(" ")),
        },
        "env" => env::vars().try_for_each(|(key, value)| writeln!(out, "{key}={value}")),
        "hostname" => writeln!(out, "{}", hostname()),
        "pwd" => writeln!(out, "{}", env::current_dir()?.display()),
        "id" => {
            // SAFETY: these calls cannot fail.
            let (uid, gid) = unsafe { (libc::geteuid(), libc::getegid()) };
            writeln!(out, "uid={uid} gid={gid}")
        }
        "ls" => list(rest.first().map_or(".", String::as_str), &mut out),
        "wget" => fetch(rest.last().map_or("", String::as_str), &mut out),
        _ => Err(io::Error::new(io::ErrorKind::NotFound, "no such program here; see coracle.local/hello")),
    }
}

fn hostname() -> String {
    // Kubernetes sets HOSTNAME to the pod's name.
    env::var("HOSTNAME")
        .or_else(|_| fs::read_to_string("/proc/sys/kernel/hostname").map(|name| name.trim().to_owned()))
        .unwrap_or_else(|_| "unknown".to_owned())
}

fn serve(port: u16) -> io::Result<()> {
    let listener = TcpListener::bind((Ipv6Addr::UNSPECIFIED, port))
        .or_else(|_| TcpListener::bind(SocketAddr::from(([0, 0, 0, 0], port))))?;
    let name = hostname();
    println!("listening on port {port}");
    let callers = std::sync::Arc::new(());
    for caller in listener.incoming() {
        let Ok(caller) = caller else { continue };
        if std::sync::Arc::strong_count(&callers) > MAX_CALLERS {
            continue;
        }
        let (name, place) = (name.clone(), callers.clone());
        let work = move || {
            let _ = answer(caller, &name);
            drop(place);
        };
        let _ = thread::Builder::new().stack_size(64 * 1024).spawn(work);
    }
    Ok(())
}

/// Answers requests on one connection until the caller closes it or asks for it.
fn answer(mut caller: TcpStream, name: &str) -> io::Result<()> {
    caller.set_read_timeout(Some(Duration::from_secs(30)))?;
    let mut head = Vec::new();
    let mut chunk = [0; 2048];
    loop {
        let end = head.windows(4).position(|window| window == b"\r\n\r\n");
        let Some(end) = end else {
            let length = caller.read(&mut chunk)?;
            if length == 0 || head.len() > MAX_HEAD {
                return Ok(());
            }
            head.extend_from_slice(&chunk[..length]);
            continue;
        };
        let text = String::from_utf8_lossy(&head[..end]).to_ascii_lowercase();
        let close =
            text.contains("connection: close") || text.lines().next().is_some_and(|line| line.ends_with("http/1.0"));
        let body = format!("Hello from {name}\n");
        let connection = if close { "close" } else { "keep-alive" };
        let shown = if text.starts_with("head ") { "" } else { &body };
        write!(
            caller,
            "HTTP/1.1 200 OK\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Length: {}\r\nConnection: {connection}\r\n\r\n{shown}",
            body.len()
        )?;
        if close {
            return Ok(());
        }
        head.drain(..end + 4);
    }
}

fn sleep(rest: &[String]) -> io::Result<()> {
    let wrong = || io::Error::new(io::ErrorKind::InvalidInput, "usage: sleep SECONDS");
    let text = rest.first().ok_or_else(wrong)?;
    if text == "infinity" {
        loop {
            thread::sleep(Duration::from_secs(3600));
        }
    }
    let (number, unit) = match text.chars().last() {
        Some('s') => (&text[..text.len() - 1], 1.0),
        Some('m') => (&text[..text.len() - 1], 60.0),
        Some('h') => (&text[..text.len() - 1], 3600.0),
        _ => (text.as_str(), 1.0),
    };
    let seconds: f64 = number.parse().map_err(|_| wrong())?;
    thread::sleep(Duration::try_from_secs_f64(seconds * unit).map_err(|_| wrong())?);
    Ok(())
}

fn cat(rest: &[String], out: &mut impl Write) -> io::Result<()> {
    if rest.is_empty() {
        io::copy(&mut io::stdin().lock(), out)?;
    }
    for path in rest {
        io::copy(&mut File::open(path)?, out)?;
    }
    out.flush()
}

fn list(path: &str, out: &mut impl Write) -> io::Result<()> {
    let mut names: Vec<String> = fs::read_dir(path)?
        .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
        .collect::<io::Result<_>>()?;
    names.sort();
    names.iter().try_for_each(|name| writeln!(out, "{name}"))
}

/// Fetches `http://ADDRESS[:PORT][/PATH]`; addresses only, there is no resolver in here.
fn fetch(url: &str, out: &mut impl Write) -> io::Result<()> {
    let wrong = || io::Error::new(io::ErrorKind::InvalidInput, "usage: wget http://ADDRESS[:PORT][/PATH]");
    let rest = url.strip_prefix("http://").ok_or_else(wrong)?;
    let (host, path) = rest.find('/').map_or((rest, "/"), |at| rest.split_at(at));
    let address: SocketAddr = match host.parse() {
        Ok(address) => address,
        Err(_) => SocketAddr::new(host.trim_matches(['[', ']']).parse().map_err(|_| wrong())?, 80),
    };
    let mut server = TcpStream::connect_timeout(&address, Duration::from_secs(5))?;
    server.set_read_timeout(Some(Duration::from_secs(10)))?;
    write!(server, "GET {path} HTTP/1.0\r\nHost: {host}\r\nConnection: close\r\n\r\n")?;
    let mut answer = Vec::new();
    server.read_to_end(&mut answer)?;
    let body = answer.windows(4).position(|window| window == b"\r\n\r\n").map_or(0, |at| at + 4);
    out.write_all(&answer[body..])
}
