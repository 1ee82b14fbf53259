//! Clients that make one call after the other, and what they measured.

use std::fmt;
use std::time::{Duration, Instant};

use crate::Result;

/// What the clients do.
#[derive(Clone, Copy)]
pub enum Kind {
    /// Writes 1 KiB.
    Put,
    /// Reads it back, linearizably.
    Get,
    /// Reads it back as this member has it.
    Read,
}

impl Kind {
    pub fn name(self) -> &'static str {
        match self {
            Kind::Put => "put",
            Kind::Get => "get",
            Kind::Read => "read",
        }
    }
}

/// Calls a second and how long one took.
pub struct Figures {
    rate: f64,
    p50: f64,
    p99: f64,
}

impl fmt::Display for Figures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.0} {:.3} {:.3}", self.rate, self.p50, self.p99)
    }
}

/// Runs so many clients for a time; `call` is called with client and number of the call.
pub async fn run<F, Fut>(clients: usize, time: Duration, call: F) -> Result<Figures>
where
    F: Fn(usize, usize) -> Fut + Clone + Send + 'static,
    Fut: Future<Output = Result<()>> + Send,
{
    let begin = Instant::now();
    let tasks: Vec<_> = (0..clients)
        .map(|client| {
            let call = call.clone();
            tokio::spawn(async move {
                let mut latencies = Vec::new();
                for n in 0.. {
                    let before = Instant::now();
                    if before - begin > time {
                        break;
                    }
                    call(client, n % 1000).await?;
                    latencies.push(before.elapsed());
                }
                Result::Ok(latencies)
            })
        })
        .collect();
    let mut latencies = Vec::new();
    for task in tasks {
        latencies.extend(task.await??);
    }
    let rate = latencies.len() as f64 / begin.elapsed().as_secs_f64();
    Ok(figures(rate, latencies))
}

fn figures(rate: f64, mut latencies: Vec<Duration>) -> Figures {
    latencies.sort_unstable();
    let at = |part: usize| latencies.get(latencies.len() * part / 100).map_or(0.0, |time| time.as_secs_f64() * 1e3);
    Figures { rate, p50: at(50), p99: at(99) }
}

/// One put after the other, which so many watchers of their prefix see: deliveries a second, and the time from the
/// beginning of a put to one of them. `put` is called with the number of the put; a watcher sends the numbers it sees.
pub async fn fan_out<F, Fut>(watchers: usize, puts: usize, put: F, mut seen: Seen) -> Result<Figures>
where
    F: Fn(usize) -> Fut,
    Fut: Future<Output = Result<()>>,
{
    let begin = Instant::now();
    let writing = async {
        let mut begun = Vec::new();
        for n in 0..puts {
            begun.push(Instant::now());
            put(n).await?;
        }
        Result::Ok(begun)
    };
    let watching = async {
        let mut deliveries = Vec::new();
        while deliveries.len() < watchers * puts {
            deliveries.push(seen.recv().await.ok_or("the watchers have ended")?);
        }
        Result::Ok(deliveries)
    };
    let (begun, deliveries) = tokio::try_join!(writing, watching)?;
    let rate = deliveries.len() as f64 / begin.elapsed().as_secs_f64();
    let latencies = deliveries.iter().filter_map(|(n, at)| Some(at.duration_since(*begun.get(*n)?))).collect();
    Ok(figures(rate, latencies))
}

/// Deliveries: the number of the put, and when.
pub type Seen = tokio::sync::mpsc::UnboundedReceiver<(usize, Instant)>;
