//! The network between the hosts of a story: a learning switch in user space, on TAP devices. Each direction between two
//! ports has a weather of its own, so partitions (also one-way), loss and delay need nothing of the kernel and touch
//! nothing of the machine.

use std::collections::{BTreeMap, BinaryHeap, HashMap};
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, RwLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, setns};

/// Number of a port; hosts count from 1.
pub type Port = u32;

type Mac = [u8; 6];

/// What happens to frames from one port to another.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Weather {
    /// Nothing arrives.
    pub cut: bool,
    /// Share of frames that are lost, 0 to 1.
    pub loss: f64,
    /// How much later frames arrive.
    pub delay: Duration,
}

/// The switch. Dropping it takes the devices away.
pub struct Switch {
    inner: Arc<Inner>,
    threads: Vec<JoinHandle<()>>,
}

#[derive(Default)]
struct Inner {
    ports: RwLock<BTreeMap<Port, Arc<File>>>,
    learnt: RwLock<HashMap<Mac, Port>>,
    weather: RwLock<HashMap<(Port, Port), Weather>>,
    later: Mutex<BinaryHeap<Late>>,
    more: Condvar,
    closed: AtomicBool,
}

/// A frame under way; the earliest comes first.
struct Late {
    due: Instant,
    to: Arc<File>,
    frame: Vec<u8>,
}

impl Ord for Late {
    fn cmp(&self, other: &Late) -> std::cmp::Ordering {
        other.due.cmp(&self.due)
    }
}
impl PartialOrd for Late {
    fn partial_cmp(&self, other: &Late) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl PartialEq for Late {
    fn eq(&self, other: &Late) -> bool {
        self.due == other.due
    }
}
impl Eq for Late {}

impl Switch {
    pub fn new() -> Switch {
        let inner = Arc::new(Inner::default());
        let delayed = {
            let inner = inner.clone();
            std::thread::spawn(move || inner.deliver_late())
        };
        Switch { inner, threads: vec![delayed] }
    }

    /// Gives a network namespace an `eth0` on this switch.
    pub fn plug(&mut self, port: Port, namespace: &str) {
        let tap = Arc::new(tap(namespace));
        self.inner.ports.write().unwrap().insert(port, tap.clone());
        let inner = self.inner.clone();
        self.threads.push(std::thread::spawn(move || inner.forward(port, &tap)));
    }

    /// Sets the weather from one port to another; not the way back.
    pub fn set(&self, from: Port, to: Port, weather: Weather) {
        self.inner.weather.write().unwrap().insert((from, to), weather);
    }

    /// Ends all partitions, loss and delay.
    pub fn heal(&self) {
        self.inner.weather.write().unwrap().clear();
    }
}

impl Drop for Switch {
    fn drop(&mut self) {
        self.inner.closed.store(true, Ordering::Relaxed);
        self.inner.more.notify_all();
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

impl Inner {
    fn forward(&self, from: Port, tap: &Arc<File>) {
        let mut buffer = vec![0; 65536];
        while !self.closed.load(Ordering::Relaxed) {
            let mut ready = [PollFd::new(tap.as_fd(), PollFlags::POLLIN)];
            let _ = poll(&mut ready, PollTimeout::from(100u16));
            while let Ok(length) = (&**tap).read(&mut buffer) {
                if length >= 14 {
                    self.switch(from, &buffer[..length]);
                }
            }
        }
    }

    fn switch(&self, from: Port, frame: &[u8]) {
        let mac = |at: usize| Mac::try_from(&frame[at..at + 6]).unwrap();
        let (to, source) = (mac(0), mac(6));
        if self.learnt.read().unwrap().get(&source) != Some(&from) {
            self.learnt.write().unwrap().insert(source, from);
        }
        let known = if to[0] & 1 == 1 { None } else { self.learnt.read().unwrap().get(&to).copied() };
        let ports = self.ports.read().unwrap();
        for (&port, tap) in ports.iter().filter(|(port, _)| **port != from && known.is_none_or(|k| k == **port)) {
            let weather = self.weather.read().unwrap().get(&(from, port)).copied().unwrap_or_default();
            if weather.cut || (weather.loss > 0.0 && rand::random_bool(weather.loss)) {
                continue;
            }
            if weather.delay.is_zero() {
                // A full queue drops, as any switch does.
                let _ = (&**tap).write(frame);
            } else {
                let late = Late { due: Instant::now() + weather.delay, to: tap.clone(), frame: frame.to_vec() };
                self.later.lock().unwrap().push(late);
                self.more.notify_one();
            }
        }
    }

    fn deliver_late(&self) {
        let mut later = self.later.lock().unwrap();
        while !self.closed.load(Ordering::Relaxed) {
            let now = Instant::now();
            let wait = match later.peek() {
                Some(late) if late.due <= now => {
                    let late = later.pop().unwrap();
                    let _ = (&*late.to).write(&late.frame);
                    continue;
                }
                Some(late) => late.due - now,
                None => Duration::from_millis(100),
            };
            later = self.more.wait_timeout(later, wait).unwrap().0;
        }
    }
}

/// Runs something on a thread of its own inside a network namespace.
pub fn inside<T: Send + 'static>(namespace: &str, work: impl FnOnce() -> T + Send + 'static) -> JoinHandle<T> {
    let file = File::open(format!("/run/netns/{namespace}")).unwrap();
    std::thread::spawn(move || {
        setns(file, CloneFlags::CLONE_NEWNET).unwrap();
        work()
    })
}

nix::ioctl_write_ptr_bad!(tun_set_interface, 0x4004_54ca, libc::ifreq);

/// A TAP device named `eth0` in a network namespace; it goes when the file is closed.
fn tap(namespace: &str) -> File {
    let open = || {
        let options = libc::O_NONBLOCK | libc::O_CLOEXEC;
        let file = File::options().read(true).write(true).custom_flags(options).open("/dev/net/tun").unwrap();
        // SAFETY: an ifreq is plain data, for which zero is a valid value.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        for (to, from) in request.ifr_name.iter_mut().zip(b"eth0") {
            *to = from.cast_signed();
        }
        request.ifr_ifru.ifru_flags = i16::try_from(libc::IFF_TAP | libc::IFF_NO_PI).unwrap();
        // SAFETY: the request outlives the call, and the kernel only reads it and writes the name back.
        unsafe { tun_set_interface(std::os::fd::AsRawFd::as_raw_fd(&file), &raw const request) }.unwrap();
        file
    };
    inside(namespace, open).join().unwrap()
}
