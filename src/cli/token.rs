//! `coracle token`: short-lived tokens that let agents join, kept as upstream keeps bootstrap tokens; and new secrets for the
//! permanent ones.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{anyhow, bail};
use base64::{Engine, engine::general_purpose::STANDARD};
use clap::{Args, Subcommand};
use http::Method;
use jiff::Timestamp;
use rand::Rng;
use serde_json::{Value, json};

use super::client::{Client, Instance, Output, Refused, age, print_table, say};
use crate::server::admin::PREFIX;

const SECRETS: &str = "/api/v1/namespaces/kube-system/secrets";
const TYPE: &str = "bootstrap.kubernetes.io/token";
const NAME: &str = "bootstrap-token-";
/// What upstream calls the uses of a token.
const USAGES: [&str; 2] = ["signing", "authentication"];

/// `coracle token`.
#[derive(Debug, Args)]
pub struct TokenArgs {
    /// Which instance.
    #[command(flatten)]
    pub instance: Instance,
    /// What to do.
    #[command(subcommand)]
    pub command: TokenCommand,
}

/// What to do with tokens.
#[derive(Debug, Subcommand)]
pub enum TokenCommand {
    /// Make a token that lets agents join for a time, and print it
    Create {
        /// How long it is good, such as 30m, 1h or 7d; 0 for ever
        #[arg(long, default_value = "24h", value_name = "TIME", value_parser = duration)]
        ttl: Duration,
        /// What it is for, in your own words
        #[arg(long, default_value = "", value_name = "TEXT")]
        description: String,
        /// What it may be used for: authentication (joining), signing
        #[arg(long, value_delimiter = ',', default_values = USAGES, value_name = "USAGE")]
        usages: Vec<String>,
        /// Groups that it authenticates as, each beginning with system:bootstrappers:
        #[arg(long, value_delimiter = ',', value_name = "GROUP")]
        groups: Vec<String>,
    },
    /// List the tokens that were created
    #[command(visible_alias = "ls")]
    List {
        /// How to print them
        #[arg(long, short, value_enum, default_value = "table")]
        output: Output,
    },
    /// Delete tokens
    #[command(visible_alias = "rm")]
    Delete {
        /// Ids, or whole tokens
        #[arg(required = true, value_name = "ID")]
        tokens: Vec<String>,
    },
    /// Give the server token and the agent token new secrets; who has joined stays, nothing restarts
    Rotate,
}

/// Runs the command.
pub fn run(args: TokenArgs) -> anyhow::Result<ExitCode> {
    let client = Client::open(&args.instance)?;
    match args.command {
        TokenCommand::Create { ttl, description, usages, groups } => {
            create(&client, ttl, &description, &usages, &groups)?
        }
        TokenCommand::List { output } => list(&client, output)?,
        TokenCommand::Delete { tokens } => {
            for token in tokens {
                let id = id_of(&token)?;
                let deleted: Result<Value, _> = client.call(Method::DELETE, &format!("{SECRETS}/{NAME}{id}"), &());
                deleted.map_err(|error| match error.downcast_ref::<Refused>() {
                    Some(Refused { code: 404, .. }) => {
                        anyhow!("there is no token {id}: `coracle token list` shows them")
                    }
                    _ => error,
                })?;
                say(format_args!("token {id} deleted"));
            }
        }
        TokenCommand::Rotate => {
            let _: Value = client.call(Method::POST, &format!("{PREFIX}tokens/rotate"), &())?;
            let server = args.instance.data_dir.join("server");
            say(format_args!("The tokens have new secrets, on every server of the cluster:"));
            say(format_args!("  servers and agents  {}", server.join("token").display()));
            say(format_args!("  agents              {}", server.join("agent-token").display()));
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// A number with a unit, as k3s takes it; without one, seconds.
fn duration(text: &str) -> Result<Duration, String> {
    let form = || "expected a time such as 30m, 1h, 7d or 1h30m".to_owned();
    let (mut seconds, mut number) = (0u64, String::new());
    for c in text.chars() {
        if c.is_ascii_digit() {
            number.push(c);
            continue;
        }
        let unit = match c {
            's' => 1,
            'm' => 60,
            'h' => 3600,
            'd' => 86_400,
            _ => return Err(form()),
        };
        let value: u64 = std::mem::take(&mut number).parse().map_err(|_| form())?;
        seconds = value.checked_mul(unit).and_then(|more| seconds.checked_add(more)).ok_or_else(form)?;
    }
    if !number.is_empty() {
        seconds = number.parse::<u64>().ok().and_then(|more| seconds.checked_add(more)).ok_or_else(form)?;
    }
    if text.is_empty() { Err(form()) } else { Ok(Duration::from_secs(seconds)) }
}

/// Random lower-case letters and digits.
fn random(length: usize) -> String {
    const ALPHABET: &[u8; 36] = b"abcdefghijklmnopqrstuvwxyz0123456789";
    let mut rng = rand::rng();
    (0..length).map(|_| char::from(ALPHABET[rng.random_range(0..ALPHABET.len())])).collect()
}

/// The id in `K10<hash>::<id>.<secret>`, `<id>.<secret>` or `<id>`.
fn id_of(token: &str) -> anyhow::Result<String> {
    let login = token.rsplit("::").next().unwrap_or(token);
    let id = login.split('.').next().unwrap_or(login).trim_start_matches(NAME);
    if id.len() == 6 && id.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit()) {
        return Ok(id.to_owned());
    }
    // A whole token is a secret: it is not repeated.
    bail!("that is no id of a token: expected 6 lower-case letters or digits, as `coracle token list` shows them");
}

fn create(
    client: &Client,
    ttl: Duration,
    description: &str,
    usages: &[String],
    groups: &[String],
) -> anyhow::Result<()> {
    if let Some(odd) = usages.iter().find(|usage| !USAGES.contains(&usage.as_str())) {
        bail!("--usages {odd:?}: there are {}", USAGES.join(" and "));
    }
    if let Some(odd) = groups.iter().find(|group| !group.starts_with("system:bootstrappers:")) {
        bail!("--groups {odd:?}: expected a name that begins with system:bootstrappers:");
    }
    let (id, secret) = (random(6), random(16));
    let expiration =
        (!ttl.is_zero()).then(|| Timestamp::from_second(Timestamp::now().as_second() + ttl.as_secs() as i64));
    let expiration = expiration.transpose()?.map(|at| at.to_string());
    let object = secret_object(&id, &secret, expiration.as_deref(), description, usages, groups);
    let _: Value = client.call(Method::POST, SECRETS, &object)?;
    say(format_args!("K10{}::{id}.{secret}", client.ca_hash()));
    Ok(())
}

fn secret_object(
    id: &str,
    secret: &str,
    expiration: Option<&str>,
    description: &str,
    usages: &[String],
    groups: &[String],
) -> Value {
    let mut data = json!({ "token-id": id, "token-secret": secret });
    for usage in usages {
        data[format!("usage-bootstrap-{usage}")] = "true".into();
    }
    if let Some(expiration) = expiration {
        data["expiration"] = expiration.into();
    }
    if !description.is_empty() {
        data["description"] = description.into();
    }
    if !groups.is_empty() {
        data["auth-extra-groups"] = groups.join(",").into();
    }
    let meta = json!({ "name": format!("{NAME}{id}"), "namespace": "kube-system" });
    json!({ "apiVersion": "v1", "kind": "Secret", "metadata": meta, "type": TYPE, "stringData": data })
}

fn list(client: &Client, output: Output) -> anyhow::Result<()> {
    let secrets: Value = client.call(Method::GET, &format!("{SECRETS}?fieldSelector=type%3D{TYPE}"), &())?;
    let now = Timestamp::now();
    let tokens: Vec<Value> = secrets["items"].as_array().into_iter().flatten().map(|s| describe(s, now)).collect();
    if output == Output::Json {
        say(format_args!("{}", serde_json::to_string_pretty(&tokens)?));
        return Ok(());
    }
    let row = |token: &Value| {
        let text = |key: &str| token[key].as_str().unwrap_or_default().to_owned();
        [text("id"), text("ttl"), text("expires"), text("usages"), text("description")]
    };
    print_table(["ID", "TTL", "EXPIRES", "USAGES", "DESCRIPTION"], &tokens.iter().map(row).collect::<Vec<_>>());
    Ok(())
}

/// A token without its secret.
fn describe(secret: &Value, now: Timestamp) -> Value {
    let text = |key: &str| {
        let bytes = secret["data"][key].as_str().and_then(|value| STANDARD.decode(value).ok()).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    };
    let expires = text("expiration");
    let ttl = match expires.parse::<Timestamp>() {
        Ok(at) if at <= now => "expired".to_owned(),
        Ok(at) => age(at.as_second() - now.as_second()),
        Err(_) if expires.is_empty() => "for ever".to_owned(),
        Err(_) => "expired".to_owned(),
    };
    let usages: Vec<_> =
        USAGES.into_iter().filter(|usage| text(&format!("usage-bootstrap-{usage}")) == "true").collect();
    json!({
        "id": text("token-id"), "ttl": ttl, "expires": expires, "usages": usages.join(","),
        "description": text("description"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_have_units() {
        let seconds = |text: &str| duration(text).map(|d| d.as_secs());
        assert_eq!(
            [seconds("90"), seconds("1h30m"), seconds("7d"), seconds("0")],
            [Ok(90), Ok(5400), Ok(604_800), Ok(0)]
        );
        for bad in ["", "h", "1w", "-1h", "99999999999999999999d"] {
            assert!(duration(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_token_is_listed_without_its_secret() {
        let object =
            secret_object("abcdef", "s3cret", Some("2026-01-01T01:00:00Z"), "for you", &["authentication".into()], &[]);
        let mut stored = object.clone();
        for (key, value) in object["stringData"].as_object().unwrap() {
            stored["data"][key] = STANDARD.encode(value.as_str().unwrap()).into();
        }
        let shown = describe(&stored, "2026-01-01T00:00:00Z".parse().unwrap());
        assert_eq!(shown["ttl"], "1h0m");
        assert_eq!(shown["usages"], "authentication");
        assert!(!shown.to_string().contains("s3cret"));
        assert_eq!(describe(&stored, "2026-01-02T00:00:00Z".parse().unwrap())["ttl"], "expired");
    }

    #[test]
    fn tokens_are_deleted_by_id_or_whole() {
        for text in ["abcdef", "abcdef.0123456789abcdef", "K10ab::abcdef.0123456789abcdef", "bootstrap-token-abcdef"] {
            assert_eq!(id_of(text).unwrap(), "abcdef", "{text}");
        }
        assert!(!id_of("K10ab::server:s3cret").unwrap_err().to_string().contains("s3cret"));
    }
}
