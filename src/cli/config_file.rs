//! The configuration file: a YAML mapping whose keys are the flag names of `coracle server` or `coracle agent`. What the command line or the
//! environment sets wins; drop-ins (`config.yaml.d/*.yaml`, in order of their names) win over the file.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use clap::parser::ValueSource;
use serde_yaml::Value;

/// Puts the file's settings before the flags that were given. Commands other than `server` and `agent` have no file.
pub fn merge(command: clap::Command, argv: Vec<OsString>) -> anyhow::Result<Vec<OsString>> {
    let Ok(matches) = command.clone().try_get_matches_from(&argv) else {
        // Whatever is wrong is reported by the real parse.
        return Ok(argv);
    };
    let Some((name @ ("server" | "agent"), chosen)) = matches.subcommand() else { return Ok(argv) };
    let Some(flags) = command.find_subcommand(name) else { return Ok(argv) };
    let given = |id: &str| matches!(chosen.value_source(id), Some(ValueSource::CommandLine | ValueSource::EnvVariable));
    let path = chosen.get_one::<PathBuf>("config").cloned().unwrap_or_default();
    let settings = read(&path, given("config"))?;
    let mut faults = Vec::new();
    let mut from_file: Vec<OsString> = Vec::new();
    for (key, (value, file)) in settings {
        let Some(flag) = flags.get_arguments().find(|a| is_called(a, &key) && key != "config") else {
            let known = flags.get_arguments().filter_map(|a| a.get_long()).filter(|l| *l != "config");
            let known = known.collect::<Vec<_>>().join(", ");
            faults.push(format!("{}: unknown key {key:?}; the keys are {known}", file.display()));
            continue;
        };
        match as_flags(&key, &value, flag.get_action()) {
            Ok(flags) if !given(flag.get_id().as_str()) => from_file.extend(flags),
            Ok(_) => {}
            Err(fault) => faults.push(format!("{}: {fault}", file.display())),
        }
    }
    if !faults.is_empty() {
        bail!("the configuration is not usable:\n  {}", faults.join("\n  "));
    }
    let mut merged: Vec<OsString> = argv.iter().take(2).cloned().collect();
    merged.extend(from_file);
    merged.extend(argv.into_iter().skip(2));
    Ok(merged)
}

/// Whether a key names this flag, by its name or by the name that k3s has for it.
fn is_called(flag: &clap::Arg, key: &str) -> bool {
    flag.get_long() == Some(key) || flag.get_all_aliases().is_some_and(|aliases| aliases.contains(&key))
}

/// All settings with the file each comes from. A file that was named must exist; the default one need not.
fn read(path: &Path, must_exist: bool) -> anyhow::Result<BTreeMap<String, (Value, PathBuf)>> {
    let mut files = Vec::new();
    if must_exist || path.exists() {
        files.push(path.to_owned());
    }
    let mut dropins = path.as_os_str().to_owned();
    dropins.push(".d");
    if let Ok(dir) = std::fs::read_dir(&dropins) {
        let mut more: Vec<PathBuf> = dir.flatten().map(|entry| entry.path()).collect();
        more.retain(|p| p.extension().is_some_and(|e| e == "yaml" || e == "yml"));
        more.sort();
        files.extend(more);
    }
    let mut settings = BTreeMap::new();
    for file in files {
        let text = std::fs::read_to_string(&file).with_context(|| format!("read configuration {}", file.display()))?;
        let value: Value =
            serde_yaml::from_str(&text).with_context(|| format!("{} is not valid YAML", file.display()))?;
        let mapping = match value {
            Value::Null => continue,
            Value::Mapping(mapping) => mapping,
            _ => bail!("{}: expected a mapping of flag names to values", file.display()),
        };
        for (key, value) in mapping {
            let Value::String(key) = key else { bail!("{}: key {key:?} is not a string", file.display()) };
            settings.insert(key, (value, file.clone()));
        }
    }
    Ok(settings)
}

fn as_flags(key: &str, value: &Value, action: &clap::ArgAction) -> Result<Vec<OsString>, String> {
    let scalar = |value: &Value| match value {
        Value::Bool(b) => Ok(b.to_string()),
        Value::Number(n) => Ok(n.to_string()),
        Value::String(s) => Ok(s.clone()),
        other => Err(format!("key {key:?}: expected a string, number, boolean or a list of them, got {other:?}")),
    };
    match (action, value) {
        (clap::ArgAction::Count, value) => {
            let n = value.as_u64().filter(|n| *n <= 8);
            let n = n.ok_or_else(|| format!("key {key:?}: expected a number from 0 to 8, got {value:?}"))?;
            Ok((0..n).map(|_| format!("--{key}").into()).collect())
        }
        (clap::ArgAction::Append, Value::Sequence(items)) => {
            items.iter().map(|item| Ok(format!("--{key}={}", scalar(item)?).into())).collect()
        }
        (_, Value::Sequence(_)) => Err(format!("key {key:?} takes one value, not a list")),
        (_, value) => Ok(vec![format!("--{key}={}", scalar(value)?).into()]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::args::{Cli, Command, ServerArgs};
    use clap::{CommandFactory, Parser};

    fn server(dir: &Path, args: &[&str]) -> anyhow::Result<ServerArgs> {
        let file = dir.join("config.yaml");
        let mut argv: Vec<OsString> = vec!["coracle".into(), "server".into(), "--config".into(), file.into()];
        argv.extend(args.iter().map(OsString::from));
        match Cli::try_parse_from(merge(Cli::command(), argv)?)?.command {
            Command::Server(args) => Ok(*args),
            other => bail!("{other:?}"),
        }
    }

    #[test]
    fn flags_win_over_drop_ins_and_these_over_the_file() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("config.yaml.d")).unwrap();
        let file =
            "node-name: file\nnode-label: [a=1, b=2]\nhttps-listen-port: 7443\ndisable-agent: true\nverbose: 2\n";
        std::fs::write(dir.path().join("config.yaml"), file).unwrap();
        std::fs::write(dir.path().join("config.yaml.d/10.yaml"), "node-name: dropin\ntls-san: one\n").unwrap();
        let args = server(dir.path(), &[]).unwrap();
        assert_eq!(args.node_name.as_deref(), Some("dropin"));
        assert_eq!(args.node_label, ["a=1", "b=2"]);
        assert_eq!((args.https_listen_port, args.disable_agent, args.verbose), (7443, true, 2));
        let args = server(dir.path(), &["--node-name", "flag", "--node-label", "c=3"]).unwrap();
        assert_eq!((args.node_name.as_deref(), args.node_label), (Some("flag"), vec!["c=3".to_owned()]));
    }

    #[test]
    fn every_bad_key_is_named_at_once() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("config.yaml"), "node-nmae: x\nnode-name: [a]\ndata-dir: {}\n").unwrap();
        let text = server(dir.path(), &[]).unwrap_err().to_string();
        for part in ["unknown key \"node-nmae\"", "\"node-name\" takes one value", "key \"data-dir\": expected"] {
            assert!(text.contains(part), "{text}");
        }
    }

    #[test]
    fn a_named_file_must_exist() {
        let text = format!("{:#}", server(Path::new("/nonexistent"), &[]).unwrap_err());
        assert!(text.contains("read configuration /nonexistent/config.yaml"), "{text}");
    }
}
