//! Device rules of cgroup version 2: a small BPF program attached to the container's cgroup.
//!
//! libcontainer 0.7 applies none there. The program is the list of rules in order; what no rule allows is refused
//! (`BPF_PROG_TYPE_CGROUP_DEVICE`, bpf(2)).

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;

/// One instruction of eBPF: opcode, registers, offset, immediate value.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Instruction {
    code: u8,
    registers: u8,
    offset: i16,
    immediate: i32,
}

const LOAD_WORD: u8 = 0x61;
const MOVE: u8 = 0xb7;
const MOVE_REGISTER: u8 = 0xbf;
const AND: u8 = 0x57;
const SHIFT_RIGHT: u8 = 0x77;
const JUMP_NOT_EQUAL: u8 = 0x55;
const EXIT: u8 = 0x95;

/// Registers: the request's kind of device, access, major and minor, and one to count with.
const KIND: u8 = 2;
const ACCESS: u8 = 3;
const MAJOR: u8 = 4;
const MINOR: u8 = 5;
const SCRATCH: u8 = 6;

/// Attaches rules, written as for `devices.allow` of version 1, to the cgroup in `folder`.
pub fn attach(folder: &Path, rules: &[String]) -> io::Result<()> {
    let program = load(&compile(rules)?)?;
    let cgroup = File::open(folder)?;
    #[repr(C)]
    struct Attach {
        target: u32,
        program: u32,
        kind: u32,
        flags: u32,
        replace: u32,
        padding: u32,
    }
    const CGROUP_DEVICE: u32 = 6;
    const ALLOW_MULTI: u32 = 2;
    let request = Attach {
        target: cgroup.as_raw_fd() as u32,
        program: program.as_raw_fd() as u32,
        kind: CGROUP_DEVICE,
        flags: ALLOW_MULTI,
        replace: 0,
        padding: 0,
    };
    const PROG_ATTACH: i32 = 8;
    bpf(PROG_ATTACH, &request).map(drop)
}

fn compile(rules: &[String]) -> io::Result<Vec<Instruction>> {
    let step = |code, target: u8, source: u8, offset, immediate| Instruction {
        code,
        registers: target | source << 4,
        offset,
        immediate,
    };
    // The context is access << 16 | kind, major, minor.
    let mut program = vec![
        step(LOAD_WORD, KIND, 1, 0, 0),
        step(MOVE_REGISTER, ACCESS, KIND, 0, 0),
        step(AND, KIND, 0, 0, 0xffff),
        step(SHIFT_RIGHT, ACCESS, 0, 0, 16),
        step(LOAD_WORD, MAJOR, 1, 4, 0),
        step(LOAD_WORD, MINOR, 1, 8, 0),
    ];
    for rule in rules {
        let rule = Rule::parse(rule).ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, rule.clone()))?;
        // Each test jumps behind the rule when it fails.
        let mut tests = vec![(KIND, rule.kind)];
        tests.extend(rule.major.map(|major| (MAJOR, major)));
        tests.extend(rule.minor.map(|minor| (MINOR, minor)));
        let mut left = tests.len() as i16 + 5;
        let mut body = Vec::new();
        for (register, value) in tests {
            left -= 1;
            body.push(step(JUMP_NOT_EQUAL, register, 0, left, value));
        }
        body.push(step(MOVE_REGISTER, SCRATCH, ACCESS, 0, 0));
        body.push(step(AND, SCRATCH, 0, 0, !rule.access & 7));
        body.push(step(JUMP_NOT_EQUAL, SCRATCH, 0, 2, 0));
        body.push(step(MOVE, 0, 0, 0, 1));
        body.push(step(EXIT, 0, 0, 0, 0));
        program.extend(body);
    }
    program.push(step(MOVE, 0, 0, 0, 0));
    program.push(step(EXIT, 0, 0, 0, 0));
    Ok(program)
}

/// `c 1:3 rwm`.
struct Rule {
    kind: i32,
    major: Option<i32>,
    minor: Option<i32>,
    access: i32,
}

impl Rule {
    fn parse(text: &str) -> Option<Self> {
        let mut parts = text.split(' ');
        let kind = match parts.next()? {
            "b" => 1,
            "c" => 2,
            _ => return None,
        };
        let (major, minor) = parts.next()?.split_once(':')?;
        let number = |text: &str| if text == "*" { Some(None) } else { text.parse().ok().map(Some) };
        let access = parts.next()?.chars().try_fold(0, |access, letter| {
            Some(
                access
                    | match letter {
                        'm' => 1,
                        'r' => 2,
                        'w' => 4,
                        _ => return None,
                    },
            )
        })?;
        Some(Self { kind, major: number(major)?, minor: number(minor)?, access })
    }
}

fn load(program: &[Instruction]) -> io::Result<OwnedFd> {
    #[repr(C)]
    struct Load {
        kind: u32,
        count: u32,
        instructions: u64,
        license: u64,
        log_level: u32,
        log_size: u32,
        log: u64,
        kernel_version: u32,
        flags: u32,
    }
    const CGROUP_DEVICE: u32 = 15;
    const PROG_LOAD: i32 = 5;
    let request = Load {
        kind: CGROUP_DEVICE,
        count: program.len() as u32,
        instructions: program.as_ptr() as u64,
        license: c"Apache-2.0".as_ptr() as u64,
        log_level: 0,
        log_size: 0,
        log: 0,
        kernel_version: 0,
        flags: 0,
    };
    let fd = bpf(PROG_LOAD, &request)?;
    // SAFETY: the kernel just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn bpf<T>(command: i32, request: &T) -> io::Result<i32> {
    // SAFETY: the request is as long as said, and what it points to outlives the call.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, request as *const T, size_of::<T>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result as i32) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn rules_are_understood_or_refused() {
        assert!(compile(&["c 1:3 rwm".to_owned(), "b *:* m".to_owned()]).is_ok());
        for bad in ["a *:* rwm", "c 1 r", "c 1:x r", "c 1:2 rq", ""] {
            assert!(compile(&[bad.to_owned()]).is_err(), "{bad}");
        }
    }

    /// Needs root and a mounted cgroup2, which a hybrid machine has under `unified`.
    #[test]
    fn a_cgroup_opens_only_what_it_may() {
        let root = ["/sys/fs/cgroup/unified", "/sys/fs/cgroup"]
            .map(Path::new)
            .into_iter()
            .find(|path| path.join("cgroup.controllers").exists());
        let Some(root) = root.filter(|_| nix::unistd::geteuid().is_root()) else { return };
        let cgroup = root.join(format!("coracle-test-devices-{}", std::process::id()));
        std::fs::create_dir(&cgroup).unwrap();
        let attached = attach(&cgroup, &["c *:* m".into(), "c 1:3 rw".into(), "c 1:5 r".into()]);
        let script = format!(
            "echo $$ > {}/cgroup.procs; : </dev/null && echo null; (: </dev/zero) && echo zero; \
             (: >>/dev/zero) 2>/dev/null || echo no-write; (: </dev/urandom) 2>/dev/null || echo no-random",
            cgroup.display()
        );
        let output = Command::new("/bin/sh").args(["-c", &script]).output().unwrap();
        std::fs::remove_dir(&cgroup).unwrap();
        attached.unwrap();
        assert_eq!(String::from_utf8_lossy(&output.stdout), "null\nzero\nno-write\nno-random\n");
    }
}
