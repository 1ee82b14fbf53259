//! What others change: a thread of its own listens to the kernel's notifications and tells that something happened.
//!
//! Nothing is concluded from a notification: whoever is told looks at the kernel again. So a lost one (the socket's
//! buffer overflows when much happens at once) is no harm as long as the loss itself is told.

use std::io;

use super::{Header, Socket};
use crate::net::mailbox::Informer;

/// `RTNLGRP_LINK`, `_NEIGH`, `_IPV4_IFADDR`, `_IPV4_ROUTE`, `_IPV6_IFADDR`, `_IPV6_ROUTE`.
pub const ROUTE_GROUPS: [i32; 6] = [1, 3, 5, 7, 9, 11];
/// `NFNLGRP_NFTABLES`.
pub const NFTABLES_GROUPS: [i32; 1] = [7];

/// Starts a thread that tells `news` whenever a notification is `relevant`, and after every loss. The thread ends some
/// seconds after nobody listens to the informer any more.
///
/// # Errors
/// The groups could not be joined or the thread not be started.
pub fn listen<T: Clone + Send + 'static>(
    name: &str,
    socket: Socket,
    groups: &[i32],
    relevant: impl Fn(&Header, &[u8]) -> bool + Send + 'static,
    informer: Informer<T>,
    news: T,
) -> io::Result<()> {
    for group in groups {
        socket.subscribe(*group)?;
    }
    std::thread::Builder::new().name(name.to_owned()).spawn(move || {
        run(socket, relevant, |seen| if seen { informer.tell(news.clone()) } else { informer.is_heard() });
    })?;
    Ok(())
}

/// `tell` gets whether anything was seen and answers whether to go on.
fn run(mut socket: Socket, relevant: impl Fn(&Header, &[u8]) -> bool, tell: impl Fn(bool) -> bool) {
    loop {
        let mut seen = false;
        match socket.receive(|header, payload| seen |= relevant(header, payload)) {
            Ok(()) => {}
            Err(error) => match error.raw_os_error() {
                Some(libc::ENOBUFS) => {
                    tracing::debug!("notifications of the kernel were lost, looking at everything again");
                    seen = true;
                }
                // Nothing for a while: a look at whether anybody still listens.
                Some(libc::EAGAIN | libc::EINTR) => {}
                _ => {
                    tracing::error!(%error, "cannot listen to the kernel's notifications");
                    return;
                }
            },
        }
        if !tell(seen) {
            return;
        }
    }
}
