//! A network namespace with programs in it.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use crate::net::netlink::Socket;
use crate::net::netlink::message::Batch;
use crate::net::netlink::route::{SCOPE_UNIVERSE, Veth};

/// A thread in a namespace of its own that does what it is told.
pub struct Space {
    pub path: PathBuf,
    work: Sender<Box<dyn FnOnce() + Send>>,
}

impl Space {
    pub fn new() -> Self {
        let (work, todo): (_, Receiver<Box<dyn FnOnce() + Send>>) = channel();
        let (tell, told) = channel();
        std::thread::spawn(move || {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
            let thread = nix::unistd::gettid();
            tell.send(PathBuf::from(format!("/proc/{}/task/{thread}/ns/net", std::process::id()))).unwrap();
            todo.into_iter().for_each(|work| work());
        });
        Self { path: told.recv().unwrap(), work }
    }

    pub fn run<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> T {
        let (done, result) = channel();
        self.work.send(Box::new(move || drop(done.send(work())))).unwrap();
        result.recv_timeout(Duration::from_secs(30)).expect("work in a namespace failed")
    }

    /// Answers every TCP connection with a name and the peer's address, and every datagram likewise.
    pub fn serve(&self, at: SocketAddr, name: &'static str) {
        self.run(move || {
            let listener = TcpListener::bind(at).unwrap();
            std::thread::spawn(move || {
                for stream in listener.incoming() {
                    let mut stream = stream.unwrap();
                    let peer = stream.peer_addr().unwrap().ip();
                    let _ = stream.write_all(format!("{name} {peer}").as_bytes());
                }
            });
            let socket = UdpSocket::bind(at).unwrap();
            std::thread::spawn(move || {
                let mut buffer = [0; 64];
                while let Ok((_, peer)) = socket.recv_from(&mut buffer) {
                    let _ = socket.send_to(format!("{name} {}", peer.ip()).as_bytes(), peer);
                }
            });
        });
    }

    /// Name of the server that answers and the address that it saw, or what went wrong.
    pub fn ask(&self, at: &str) -> Result<(String, String), std::io::ErrorKind> {
        let at: SocketAddr = at.parse().unwrap();
        self.run(move || {
            let mut stream = TcpStream::connect_timeout(&at, Duration::from_millis(700)).map_err(|e| e.kind())?;
            stream.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
            let mut text = String::new();
            stream.read_to_string(&mut text).map_err(|e| e.kind())?;
            let (name, peer) = text.split_once(' ').unwrap();
            Ok((name.to_owned(), peer.to_owned()))
        })
    }

    /// As [`Self::ask`], but a busy machine that has not brought a link to life yet is asked again.
    pub fn ask_patiently(&self, at: &str) -> Result<(String, String), std::io::ErrorKind> {
        (0..10)
            .map(|_| self.ask(at))
            .find(|answer| *answer != Err(std::io::ErrorKind::TimedOut))
            .unwrap_or_else(|| self.ask(at))
    }

    pub fn datagram_socket(&self) -> Arc<UdpSocket> {
        self.run(|| {
            let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
            socket.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
            Arc::new(socket)
        })
    }

    /// Name of the server that answers this socket, if any does.
    pub fn ask_datagram(&self, socket: &Arc<UdpSocket>, at: &str) -> Option<String> {
        let (socket, at) = (socket.clone(), at.parse::<SocketAddr>().unwrap());
        self.run(move || {
            socket.send_to(b"?", at).ok()?;
            let mut buffer = [0; 64];
            let (length, _) = socket.recv_from(&mut buffer).ok()?;
            Some(String::from_utf8_lossy(&buffer[..length]).split(' ').next()?.to_owned())
        })
    }

    /// Runs a program in the namespace; returns what it printed.
    pub fn command(&self, line: &str) -> String {
        let words: Vec<String> = line.split(' ').map(str::to_owned).collect();
        self.run(move || {
            let output = std::process::Command::new(&words[0]).args(&words[1..]).output().unwrap();
            assert!(output.status.success(), "{words:?}: {}", String::from_utf8_lossy(&output.stderr));
            String::from_utf8(output.stdout).unwrap()
        })
    }

    /// Links made from now on are used at once, as those of a machine that runs for a while.
    pub fn without_duplicate_address_detection(&self) {
        self.run(|| std::fs::write("/proc/sys/net/ipv6/conf/default/accept_dad", "0").unwrap());
    }

    /// Gives a link of the namespace an address with its subnet, and brings both up.
    pub fn address(&self, link: &'static str, address: &str) {
        let address: ipnet::IpNet = address.parse().unwrap();
        self.run(move || {
            let mut socket = Socket::route().unwrap();
            let (wire, lo) = (socket.link(link).unwrap().unwrap(), socket.link("lo").unwrap().unwrap());
            let mut batch = Batch::new();
            batch.set_up(lo.index, &[], true);
            batch.set_up(wire.index, &[], true);
            // IFA_ADDRESS equals the local address, so the subnet's route comes with it.
            batch.add_address(wire.index, address, SCOPE_UNIVERSE);
            socket.apply(&mut batch).unwrap();
        });
    }

    /// A cable between two namespaces.
    pub fn wire(&self, name: &'static str, other: &Self, other_name: String) {
        let other = other.path.clone();
        self.run(move || {
            use std::os::fd::AsRawFd;
            let other = std::fs::File::open(other).unwrap();
            let mut batch = Batch::new();
            batch.add_veth(&Veth {
                name,
                alias: "",
                mac: rand::random::<[u8; 6]>().map(|byte| byte & 0xfc | 2),
                peer_name: &other_name,
                peer_mac: rand::random::<[u8; 6]>().map(|byte| byte & 0xfc | 2),
                peer_netns: other.as_raw_fd(),
                mtu: 1500,
            });
            Socket::route().unwrap().apply(&mut batch).unwrap();
        });
    }
}
