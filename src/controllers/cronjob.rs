//! CronJobs: Jobs at the times of a schedule.

use std::sync::Arc;
use std::time::Duration;

use futures::future::{BoxFuture, FutureExt};
use jiff::Timestamp;
use jiff::tz::TimeZone;
use k8s_openapi::api::batch::v1::{CronJob, CronJobSpec, CronJobStatus, Job};
use k8s_openapi::api::core::v1::ObjectReference;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{DeleteOptions, ObjectMeta, Time};

use super::Term;
use super::api::{Api, ApiError};
use super::event::{EventType, Events, reference};
use super::informer::Informer;
use super::object::{Key, Object};
use super::owner::{enqueue_owner, enqueue_self};
use super::queue::Queue;
use super::resource::{CRON_JOBS, JOBS};
use super::runner::{Controller, Next, Reconcile, ReconcileError};
use super::schedule::Schedule;
use super::template::controller_reference;
use super::timezone;

/// Timers are set this much late, so that clocks that differ a little do not make them early.
const SLACK: Duration = Duration::from_millis(100);

/// Starts the loop.
pub fn start(term: &Term) {
    let queue = Arc::new(Queue::default());
    let (crons, jobs) = (term.informers.of(&CRON_JOBS), term.informers.of(&JOBS));
    let api = term.api("cronjob-controller");
    let subscriptions = vec![enqueue_self(&queue, &crons), enqueue_owner(&queue, &CRON_JOBS, &crons, &jobs)];
    let reconcile = Arc::new(CronJobs {
        events: term.recorder.events(&api, "cronjob-controller"),
        api,
        crons: crons.clone(),
        jobs: jobs.clone(),
    });
    let needs = vec![crons, jobs];
    term.start(Controller { name: "cronjob", queue, concurrency: 4, needs, subscriptions, reconcile });
}

struct CronJobs {
    api: Api,
    events: Events,
    crons: Arc<Informer>,
    jobs: Arc<Informer>,
}

/// The last time that was due and not served yet, and whether very many were missed.
pub fn due(schedule: &Schedule, spec: &CronJobSpec, since: Timestamp, now: Timestamp) -> Option<(Timestamp, bool)> {
    let mut earliest = since;
    if let Some(deadline) = spec.starting_deadline_seconds {
        earliest = earliest.max(now - jiff::SignedDuration::from_secs(deadline));
    }
    let (mut last, mut count) = (None, 0u32);
    let mut time = schedule.next(earliest)?;
    while time <= now {
        last = Some(time);
        count += 1;
        if count > 100 {
            // Walk back from now instead of through years of minutes.
            return Some((schedule.last_before(now).or(last)?, true));
        }
        time = schedule.next(time)?;
    }
    last.map(|last| (last, false))
}

impl Reconcile for CronJobs {
    fn reconcile<'a>(&'a self, key: &'a Key) -> BoxFuture<'a, Result<Next, ReconcileError>> {
        self.sync(key).boxed()
    }
}

/// How a Job ended: `Complete`, `Failed` or not yet.
fn ended(job: &Job) -> Option<&str> {
    let conditions = job.status.as_ref()?.conditions.as_ref()?;
    let mut last =
        conditions.iter().filter(|one| one.status == "True" && (one.type_ == "Complete" || one.type_ == "Failed"));
    last.next().map(|condition| condition.type_.as_str())
}

impl CronJobs {
    async fn sync(&self, key: &Key) -> Result<Next, ReconcileError> {
        let Some(object) = self.crons.get(key) else { return Ok(Next::Done) };
        let cron: CronJob = object.decode()?;
        let Some(spec) = cron.spec.as_ref() else { return Ok(Next::Done) };
        let owned: Vec<Arc<Object>> = self.jobs.read().controlled_by(&object.uid).cloned().collect();
        let jobs: Vec<(Arc<Object>, Job)> = owned
            .into_iter()
            .map(|job| job.decode().map(|decoded| (job, decoded)))
            .collect::<Result<_, serde_json::Error>>()?;
        let mut status = cron.status.clone().unwrap_or_default();
        self.observe(&object, &jobs, &mut status);
        let next = self.start_due(&object, &cron, spec, &jobs, &mut status).await;
        self.prune(&object, spec, &jobs, &mut status).await?;
        if status.active.as_ref().is_some_and(Vec::is_empty) {
            status.active = None;
        }
        if cron.status.clone().unwrap_or_default() != status {
            self.api.update_status(&CRON_JOBS, &object, &status).await?;
        }
        next
    }

    fn tell(&self, object: &Object, kind: EventType, reason: &'static str, message: String) {
        self.events.tell(&CRON_JOBS, object, kind, reason, message);
    }

    /// Takes in what became of the Jobs.
    fn observe(&self, object: &Object, jobs: &[(Arc<Object>, Job)], status: &mut CronJobStatus) {
        let active = status.active.get_or_insert_default();
        for (job, decoded) in jobs {
            let listed = active.iter().position(|one| one.uid.as_deref() == Some(&job.uid));
            match (ended(decoded), listed) {
                (None, None) => {
                    let name = job.key.name();
                    let message = format!("Saw a job that the controller did not create or forgot: {name}");
                    self.tell(object, EventType::Warning, "UnexpectedJob", message);
                }
                (Some(how), Some(index)) => {
                    active.remove(index);
                    let message = format!("Saw completed job: {}, condition: {how}", job.key.name());
                    self.tell(object, EventType::Normal, "SawCompletedJob", message);
                }
                _ => {}
            }
            let completed = decoded.status.as_ref().and_then(|status| status.completion_time.clone());
            if ended(decoded) == Some("Complete") && completed > status.last_successful_time {
                status.last_successful_time = completed;
            }
        }
        active.retain(|one| {
            let there = jobs.iter().any(|(job, _)| one.uid.as_deref() == Some(&job.uid));
            if !there {
                let name = one.name.as_deref().unwrap_or_default();
                self.tell(object, EventType::Normal, "MissingJob", format!("Active job went missing: {name}"));
            }
            there
        });
    }

    async fn start_due(
        &self,
        object: &Object,
        cron: &CronJob,
        spec: &CronJobSpec,
        jobs: &[(Arc<Object>, Job)],
        status: &mut CronJobStatus,
    ) -> Result<Next, ReconcileError> {
        if object.deleting.is_some() || spec.suspend == Some(true) {
            return Ok(Next::Done);
        }
        let Some(schedule) = self.schedule(object, spec) else { return Ok(Next::Done) };
        let now = Timestamp::now();
        let next = schedule.next(now).and_then(|time| Duration::try_from(time.duration_since(now)).ok());
        let next = next.map_or(Next::Done, |wait| Next::After(wait + SLACK));
        let created = cron.metadata.creation_timestamp.as_ref().map_or(now, |time| time.0);
        let since = status.last_schedule_time.as_ref().map_or(created, |time| time.0);
        let Some((time, many)) = due(&schedule, spec, since, now) else { return Ok(next) };
        if many {
            let message =
                "too many missed start times. Set or decrease .spec.startingDeadlineSeconds or check clock skew";
            self.tell(object, EventType::Warning, "TooManyMissedTimes", message.to_owned());
        }
        let late = spec.starting_deadline_seconds.is_some_and(|allowed| time.as_second() + allowed < now.as_second());
        if late {
            let when = jiff::fmt::strtime::format("%a, %d %b %Y %H:%M:%S UTC", time).unwrap_or_default();
            self.tell(
                object,
                EventType::Warning,
                "MissSchedule",
                format!("Missed scheduled time to start a job: {when}"),
            );
            return Ok(next);
        }
        let active = status.active.clone().unwrap_or_default();
        if spec.concurrency_policy.as_deref() == Some("Forbid") && !active.is_empty() {
            let message = "Not starting job because prior execution is running and concurrency policy is Forbid";
            self.tell(object, EventType::Normal, "JobAlreadyActive", message.to_owned());
            return Ok(next);
        }
        if spec.concurrency_policy.as_deref() == Some("Replace") {
            for (job, _) in jobs.iter().filter(|(job, _)| active.iter().any(|one| one.uid.as_deref() == Some(&job.uid)))
            {
                self.delete(object, job).await?;
                status.active.get_or_insert_default().retain(|one| one.uid.as_deref() != Some(&job.uid));
            }
        }
        if let Some(started) = self.create(object, spec, time, &schedule).await? {
            status.active.get_or_insert_default().push(started);
        }
        status.last_schedule_time = Some(Time(time));
        Ok(next)
    }

    fn schedule(&self, object: &Object, spec: &CronJobSpec) -> Option<Schedule> {
        let zone = match &spec.time_zone {
            None => TimeZone::UTC,
            Some(name) => match timezone::load(name) {
                Ok(zone) => zone,
                Err(error) => {
                    let message = format!("invalid timeZone: \"{name}\": {error}");
                    self.tell(object, EventType::Warning, "UnknownTimeZone", message);
                    return None;
                }
            },
        };
        match Schedule::parse(&spec.schedule, zone) {
            Ok(schedule) => Some(schedule),
            Err(error) => {
                let message = format!("unparseable schedule: \"{}\" : {error}", spec.schedule);
                self.tell(object, EventType::Warning, "UnparseableSchedule", message);
                None
            }
        }
    }

    async fn create(
        &self,
        object: &Object,
        spec: &CronJobSpec,
        time: Timestamp,
        schedule: &Schedule,
    ) -> Result<Option<ObjectReference>, ReconcileError> {
        let template = &spec.job_template;
        let given = template.metadata.clone().unwrap_or_default();
        let mut annotations = given.annotations.unwrap_or_default();
        annotations.insert("batch.kubernetes.io/cronjob-scheduled-timestamp".to_owned(), schedule.local(time));
        let name = format!("{}-{}", object.key.name(), time.as_second() / 60);
        let job = Job {
            metadata: ObjectMeta {
                name: Some(name.clone()),
                namespace: Some(object.key.namespace().to_owned()),
                labels: given.labels,
                annotations: Some(annotations),
                owner_references: Some(vec![controller_reference(&CRON_JOBS, object)]),
                ..ObjectMeta::default()
            },
            spec: template.spec.clone(),
            status: None,
        };
        match self.api.create(&JOBS, object.key.namespace(), &job).await {
            Ok(created) => {
                self.tell(object, EventType::Normal, "SuccessfulCreate", format!("Created job {name}"));
                Ok(Some(reference(&JOBS, &created)))
            }
            Err(error) if error.is_already_exists() => {
                let present = self.jobs.get(&Key::new(object.key.namespace(), &name));
                Ok(present.filter(|job| job.is_controlled_by(&object.uid)).map(|job| reference(&JOBS, &job)))
            }
            Err(error) => {
                if !error.is_namespace_terminating() {
                    self.tell(object, EventType::Warning, "FailedCreate", format!("Error creating job: {error}"));
                }
                Err(error.into())
            }
        }
    }

    /// Deletes ended Jobs beyond the limits, the oldest first.
    async fn prune(
        &self,
        object: &Object,
        spec: &CronJobSpec,
        jobs: &[(Arc<Object>, Job)],
        status: &mut CronJobStatus,
    ) -> Result<(), ReconcileError> {
        let limits = [("Complete", spec.successful_jobs_history_limit), ("Failed", spec.failed_jobs_history_limit)];
        for (how, limit) in limits {
            let Some(limit) = limit.and_then(|limit| usize::try_from(limit).ok()) else { continue };
            let mut done: Vec<&(Arc<Object>, Job)> = jobs.iter().filter(|(_, job)| ended(job) == Some(how)).collect();
            done.sort_by_key(|(object, job)| {
                (job.status.as_ref().and_then(|status| status.start_time.clone()), object.key.clone())
            });
            let excess = done.len().saturating_sub(limit);
            for (job, _) in done.into_iter().take(excess) {
                self.delete(object, job).await?;
                status.active.get_or_insert_default().retain(|one| one.uid.as_deref() != Some(&job.uid));
            }
        }
        Ok(())
    }

    async fn delete(&self, object: &Object, job: &Object) -> Result<(), ApiError> {
        let background =
            DeleteOptions { propagation_policy: Some("Background".to_owned()), ..DeleteOptions::default() };
        match self.api.delete_with(&JOBS, &job.key, &job.uid, &background).await {
            Ok(_) => {
                let message = format!("Deleted job {}", job.key.name());
                self.tell(object, EventType::Normal, "SuccessfulDelete", message);
                Ok(())
            }
            Err(error) => {
                self.tell(object, EventType::Warning, "FailedDelete", format!("Deleted job: {error}"));
                Err(error)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_missed_time_is_served_unless_it_is_too_old() {
        let time = |text: &str| text.parse::<Timestamp>().unwrap();
        let schedule = Schedule::parse("*/10 * * * *", TimeZone::UTC).unwrap();
        let spec = |deadline| CronJobSpec { starting_deadline_seconds: deadline, ..CronJobSpec::default() };
        let (since, now) = (time("2026-01-01T00:01:00Z"), time("2026-01-01T00:35:00Z"));
        assert_eq!(due(&schedule, &spec(None), since, now), Some((time("2026-01-01T00:30:00Z"), false)));
        assert_eq!(due(&schedule, &spec(Some(60)), since, now), None);
        assert_eq!(due(&schedule, &spec(None), time("2026-01-01T00:30:00Z"), now), None);
        let (last, many) = due(&schedule, &spec(None), time("2025-01-01T00:00:00Z"), now).unwrap();
        assert_eq!((last, many), (time("2026-01-01T00:30:00Z"), true));
    }
}
