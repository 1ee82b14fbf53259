//! Names and addresses inside the cluster.

use crate::harness::Server;
use crate::web;

#[test]
fn pods_find_services_by_name() {
    let server = Server::start(&[]);
    web::deploy(&server);
    let ip = server.kubectl(&["get", "service", "web", "-o", "jsonpath={.spec.clusterIP}"]);
    let dig = server.host.command("python3").args(["-c", DNS_QUERY, "web.default.svc.cluster.local"]).output().unwrap();
    assert_eq!(String::from_utf8_lossy(&dig.stdout).trim(), ip, "{}", String::from_utf8_lossy(&dig.stderr));
    let missing =
        server.host.command("python3").args(["-c", DNS_QUERY, "nope.default.svc.cluster.local"]).output().unwrap();
    assert_eq!(String::from_utf8_lossy(&missing.stdout).trim(), "rcode 3");
}

/// Asks the cluster DNS for an A record with nothing but Python's standard library.
const DNS_QUERY: &str = r#"
import socket, struct, sys
name = b"".join(bytes([len(p)]) + p.encode() for p in sys.argv[1].split(".")) + b"\0"
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.settimeout(3)
s.sendto(struct.pack(">6H", 7, 0x100, 1, 0, 0, 0) + name + struct.pack(">2H", 1, 1), ("10.43.0.10", 53))
answer = s.recv(1500)
flags, _, count = struct.unpack(">3H", answer[2:8])
print(socket.inet_ntoa(answer[-4:]) if count else "rcode %d" % (flags & 15))
"#;
