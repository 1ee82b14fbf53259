//! Raw flags become checked settings, once. Every fault is reported in one go, with the flag, the value and what would do.

use std::net::IpAddr;

use anyhow::bail;
use coracle_agent::net::Backend;
use ipnet::IpNet;
use k8s_openapi::api::core::v1::Taint;
use nix::sys::socket::{getsockopt, sockopt};

use super::args::ServerArgs;
use crate::apiserver::names;
use crate::controllers::schedule::Schedule;
use crate::server::Settings;
use crate::server::settings::Snapshots;

/// Components that `--disable` knows.
const COMPONENTS: [&str; 2] = ["coredns", "kube-proxy"];
/// Names that k3s users disable and that Coracle never had: accepted, nothing to do.
const ABSENT: [&str; 5] = ["traefik", "servicelb", "metrics-server", "local-storage", "runtimes"];

/// What is wrong with the flags, one line each.
#[derive(Default)]
pub(super) struct Faults(pub(super) Vec<String>);

impl Faults {
    /// What was parsed; a failure is noted.
    pub(super) fn check<T, E: std::fmt::Display>(
        &mut self,
        flag: &str,
        value: &str,
        parsed: Result<T, E>,
    ) -> Option<T> {
        parsed.map_err(|e| self.0.push(format!("--{flag} {value:?}: {e}"))).ok()
    }
}

/// Checks all flags of `coracle server`.
pub fn check(args: ServerArgs) -> anyhow::Result<Settings> {
    let mut faults = Faults::default();
    let name = args.node_name.clone().map_or_else(host_name, Ok)?;
    let node_name = faults.check("node-name", &name, node_name(&name));
    let cluster_cidr = faults.check("cluster-cidr", &args.cluster_cidr, cidrs(&args.cluster_cidr, 22, 64));
    let service_cidr = faults.check("service-cidr", &args.service_cidr, cidrs(&args.service_cidr, 28, 124));
    if let (Some(pods), Some(services)) = (&cluster_cidr, &service_cidr) {
        check_ranges(pods, services, &mut faults);
    }
    let backend = faults.check("flannel-backend", &args.flannel_backend, args.flannel_backend.parse::<Backend>());
    let range = &args.service_node_port_range;
    let node_ports = faults.check("service-node-port-range", range, port_range(range));
    let mode = &args.write_kubeconfig_mode;
    let kubeconfig_mode = faults.check("write-kubeconfig-mode", mode, file_mode(mode));
    let domain = args.cluster_domain.trim_end_matches('.').to_owned();
    faults.check("cluster-domain", &domain, domain_name(&domain));
    let labels: Vec<_> =
        args.node_label.iter().filter_map(|text| faults.check("node-label", text, label(text))).collect();
    let taints: Vec<_> =
        args.node_taint.iter().filter_map(|text| faults.check("node-taint", text, taint(text))).collect();
    let dns = service_cidr.as_deref().map(|ranges| cluster_dns(&args.cluster_dns, ranges, &mut faults));
    for san in &args.tls_san {
        let valid = san.parse::<IpAddr>().is_ok() || domain_name(san.strip_prefix("*.").unwrap_or(san)).is_ok();
        let valid = if valid { Ok(()) } else { Err("expected a DNS name or an IP address") };
        faults.check("tls-san", san, valid);
    }
    check_components(&args.disable, &mut faults);
    let server = args.server.as_deref().filter(|url| !url.is_empty());
    let server = server.map(|url| faults.check("server", url, super::agent::server_address(url)));
    let token = token(args.token.as_deref(), args.token_file.as_deref()).unwrap_or_else(|fault| {
        faults.0.push(fault);
        None
    });
    let cron = args.snapshot_schedule_cron.trim();
    let parsed = (!cron.is_empty()).then(|| Schedule::parse(cron, jiff::tz::TimeZone::UTC));
    let schedule =
        parsed.and_then(|parsed| faults.check("snapshot-schedule-cron", cron, parsed)).map(|_| cron.to_owned());
    if args.https_listen_port == 0 {
        faults.0.push("--https-listen-port 0: expected a port from 1 to 65535".to_owned());
    }
    let (
        Some(node_name),
        Some(cluster_cidr),
        Some(service_cidr),
        Some(node_ports),
        Some(kubeconfig_mode),
        Some(dns),
        Some(backend),
        true,
    ) = (node_name, cluster_cidr, service_cidr, node_ports, kubeconfig_mode, dns, backend, faults.0.is_empty())
    else {
        bail!("the settings are not usable:\n  {}", faults.0.join("\n  "));
    };
    let snapshots = Snapshots {
        schedule,
        retention: args.snapshot_retention,
        dir: args.snapshot_dir.clone().unwrap_or_else(|| args.data_dir.join("server/snapshots")),
    };
    let disabled = |name: &str| args.disable.iter().any(|d| d == name);
    Ok(Settings {
        data_dir: args.data_dir,
        bind_address: args.bind_address.unwrap_or_else(everywhere),
        port: args.https_listen_port,
        advertise_address: args.advertise_address,
        tls_san: args.tls_san,
        server: server.flatten(),
        token,
        cluster_cidr,
        service_cidr,
        backend,
        node_ports,
        cluster_dns: dns,
        cluster_domain: domain,
        kubeconfig: args.write_kubeconfig,
        kubeconfig_mode,
        node_name,
        node_ips: args.node_ip,
        node_labels: labels,
        node_taints: taints,
        resolv_conf: args.resolv_conf,
        agent: !args.disable_agent,
        dns: !disabled("coredns"),
        service_proxy: !disabled("kube-proxy"),
        snapshots,
        cluster_reset: args.cluster_reset,
        restore_path: args.cluster_reset_restore_path,
    })
}

/// All addresses: a socket of IPv6 takes connections over IPv4 too, unless the kernel has no IPv6 or keeps them apart
/// (`net.ipv6.bindv6only`).
fn everywhere() -> IpAddr {
    let six = IpAddr::V6(std::net::Ipv6Addr::UNSPECIFIED);
    let socket = std::net::UdpSocket::bind((six, 0));
    match socket.map(|socket| getsockopt(&socket, sockopt::Ipv6V6Only)) {
        Ok(Ok(false)) => six,
        _ => IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED),
    }
}

/// `--token`, or what `--token-file` holds; whether it is one shows when it is needed.
fn token(given: Option<&str>, file: Option<&std::path::Path>) -> Result<Option<String>, String> {
    match (given.filter(|text| !text.is_empty()), file) {
        (Some(text), _) => Ok(Some(text.to_owned())),
        (None, Some(file)) => match std::fs::read_to_string(file) {
            Ok(text) => Ok(Some(text.trim().to_owned())),
            Err(error) => Err(format!("--token-file {:?}: {error}", file.display())),
        },
        (None, None) => Ok(None),
    }
}

/// Names that `--disable` may have.
pub(super) fn check_components(disabled: &[String], faults: &mut Faults) {
    for name in disabled {
        if ABSENT.contains(&name.as_str()) {
            tracing::warn!(name, "nothing to disable, Coracle does not have this component");
        } else if !COMPONENTS.contains(&name.as_str()) {
            faults.0.push(format!("--disable {name:?}: no such component; there are {}", COMPONENTS.join(", ")));
        }
    }
}

/// The host's name, in the form a Node may have.
pub(super) fn host_name() -> anyhow::Result<String> {
    let name = nix::unistd::gethostname()?;
    Ok(name.to_string_lossy().to_lowercase())
}

pub(crate) fn node_name(name: &str) -> Result<String, String> {
    domain_name(name)?;
    Ok(name.to_owned())
}

fn domain_name(name: &str) -> Result<(), String> {
    let label = |l: &str| {
        !l.is_empty()
            && l.len() <= 63
            && l.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
            && !l.starts_with('-')
            && !l.ends_with('-')
    };
    if name.len() <= 253 && name.split('.').all(label) {
        return Ok(());
    }
    Err("expected lower case letters, digits, '-' and '.', such as \"node-1\" or \"node-1.example.com\"".to_owned())
}

/// One range, or one of each family with the primary one first; a prefix may be as long as given for its family.
fn cidrs(text: &str, longest_v4: u8, longest_v6: u8) -> Result<Vec<IpNet>, String> {
    let parse = |text: &str| -> Result<IpNet, String> {
        let expected = "expected a range such as \"10.42.0.0/16\", or one of each family, \"10.42.0.0/16,fd42::/56\"";
        let net: IpNet = text.trim().parse().map_err(|_| expected.to_owned())?;
        let longest = if net.addr().is_ipv4() { longest_v4 } else { longest_v6 };
        if net.prefix_len() > longest {
            return Err(format!("{net} is too small; give a range of at least /{longest}"));
        }
        Ok(net.trunc())
    };
    let nets = text.split(',').map(parse).collect::<Result<Vec<_>, _>>()?;
    match nets.as_slice() {
        [_] => Ok(nets),
        [first, second] if first.addr().is_ipv4() != second.addr().is_ipv4() => Ok(nets),
        _ => Err("give at most one IPv4 and one IPv6 range".to_owned()),
    }
}

fn check_ranges(pods: &[IpNet], services: &[IpNet], faults: &mut Faults) {
    for (pods, services) in pods.iter().flat_map(|pods| services.iter().map(move |services| (pods, services))) {
        if pods.contains(services) || services.contains(pods) {
            faults.0.push(format!(
                "--cluster-cidr {pods} and --service-cidr {services} overlap; choose two separate ranges"
            ));
        }
    }
    let families = |ranges: &[IpNet]| ranges.iter().map(|range| range.addr().is_ipv4()).collect::<Vec<_>>();
    if families(pods) != families(services) {
        faults.0.push(
            "--cluster-cidr and --service-cidr must have ranges of the same families, in the same order".to_owned(),
        );
    }
}

/// The addresses given, or the tenth of each range.
fn cluster_dns(given: &[IpAddr], ranges: &[IpNet], faults: &mut Faults) -> Vec<IpAddr> {
    let chosen: Vec<IpAddr> = match given {
        [] => ranges.iter().filter_map(|range| nth(*range, 10)).collect(),
        given => given.to_vec(),
    };
    for dns in &chosen {
        if !ranges.iter().any(|range| range.contains(dns)) {
            let ranges: Vec<String> = ranges.iter().map(ToString::to_string).collect();
            faults.0.push(format!("--cluster-dns {dns}: must lie in --service-cidr {}", ranges.join(",")));
        }
    }
    chosen
}

fn nth(range: IpNet, n: u8) -> Option<IpAddr> {
    let ip = match range.network() {
        IpAddr::V4(ip) => IpAddr::from(std::net::Ipv4Addr::from_bits(ip.to_bits().checked_add(u32::from(n))?)),
        IpAddr::V6(ip) => IpAddr::from(std::net::Ipv6Addr::from_bits(ip.to_bits().checked_add(u128::from(n))?)),
    };
    range.contains(&ip).then_some(ip)
}

fn port_range(text: &str) -> Result<std::ops::RangeInclusive<u16>, String> {
    let parse = |text: &str| text.trim().parse::<u16>().ok().filter(|p| *p > 0);
    let range = text.split_once('-').and_then(|(from, to)| Some((parse(from)?, parse(to)?)));
    match range {
        Some((from, to)) if from <= to => Ok(from..=to),
        _ => Err("expected two ports such as \"30000-32767\"".to_owned()),
    }
}

fn file_mode(text: &str) -> Result<u32, String> {
    u32::from_str_radix(text, 8)
        .ok()
        .filter(|mode| mode & !0o777 == 0 && mode & 0o400 != 0)
        .ok_or_else(|| "expected an octal mode that the owner can read, such as \"0600\"".to_owned())
}

pub(super) fn label(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').ok_or("expected KEY=VALUE")?;
    let faults: Vec<String> = names::qualified_name(key).into_iter().chain(names::label_value(value)).collect();
    if faults.is_empty() { Ok((key.to_owned(), value.to_owned())) } else { Err(faults.join("; ")) }
}

pub(super) fn taint(text: &str) -> Result<Taint, String> {
    let (key_value, effect) = text.rsplit_once(':').ok_or("expected KEY=VALUE:EFFECT or KEY:EFFECT")?;
    if !["NoSchedule", "PreferNoSchedule", "NoExecute"].contains(&effect) {
        return Err(format!("effect {effect:?} is none of NoSchedule, PreferNoSchedule, NoExecute"));
    }
    let (key, value) = key_value.split_once('=').unwrap_or((key_value, ""));
    let (key, value) = label(&format!("{key}={value}"))?;
    let value = Some(value).filter(|v| !v.is_empty());
    Ok(Taint { key, value, effect: effect.to_owned(), time_added: None })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::args::{Cli, Command};
    use clap::Parser;

    fn parse(flags: &[&str]) -> anyhow::Result<Settings> {
        let argv = ["coracle", "server", "--node-name=n1"].iter().chain(flags);
        match Cli::try_parse_from(argv)?.command {
            Command::Server(args) => check(*args),
            other => bail!("{other:?}"),
        }
    }

    #[test]
    fn defaults_are_those_of_k3s() {
        let settings = parse(&[]).unwrap();
        assert_eq!(settings.cluster_dns, ["10.43.0.10".parse::<IpAddr>().unwrap()]);
        assert_eq!(settings.backend, Backend::Vxlan);
        assert_eq!((settings.node_ports, settings.kubeconfig_mode), (30000..=32767, 0o600));
        assert!(settings.agent && settings.dns && settings.service_proxy);
    }

    #[test]
    fn ranges_of_both_families_are_given_as_k3s_users_do() {
        let settings =
            parse(&["--cluster-cidr=10.42.0.0/16,fd42::/56", "--service-cidr=10.43.0.0/16,fd43::/112"]).unwrap();
        let dns: Vec<String> = settings.cluster_dns.iter().map(ToString::to_string).collect();
        assert_eq!(dns, ["10.43.0.10", "fd43::a"]);
        let settings = parse(&["--cluster-cidr=fd42::/56", "--service-cidr=fd43::/112", "--flannel-backend=host-gw"]);
        assert_eq!(settings.unwrap().backend, Backend::HostGw);
        for (flags, part) in [
            (&["--cluster-cidr=10.42.0.0/16,10.44.0.0/16"][..], "at most one IPv4 and one IPv6"),
            (&["--cluster-cidr=10.42.0.0/16,fd42::/56"], "the same families"),
            (&["--cluster-cidr=fd42::/80", "--service-cidr=fd43::/112"], "at least /64"),
            (&["--flannel-backend=wireguard-native"], "use vxlan or host-gw"),
        ] {
            let text = parse(flags).unwrap_err().to_string();
            assert!(text.contains(part), "{part} is missing in: {text}");
        }
    }

    #[test]
    fn all_faults_are_reported_together_with_what_would_do() {
        let flags = [
            "--cluster-cidr=10.0.0.0/8",
            "--service-cidr=10.43.0.0/16",
            "--service-node-port-range=9-1",
            "--write-kubeconfig-mode=9",
            "--node-label=a",
            "--node-taint=a=b:Sometimes",
            "--disable=nonsense",
            "--cluster-dns=1.2.3.4",
            "--tls-san=-",
            "--cluster-domain=X",
        ];
        let text = parse(&flags).unwrap_err().to_string();
        for part in [
            "overlap",
            "--service-node-port-range \"9-1\": expected two ports",
            "--write-kubeconfig-mode \"9\"",
            "--node-label \"a\": expected KEY=VALUE",
            "effect \"Sometimes\"",
            "--disable \"nonsense\"",
            "--cluster-dns 1.2.3.4: must lie in",
            "--tls-san \"-\"",
            "--cluster-domain \"X\"",
        ] {
            assert!(text.contains(part), "{part} is missing in: {text}");
        }
    }
}
