//! Ended Jobs with `ttlSecondsAfterFinished` go when their time is over.

use std::sync::Arc;
use std::time::Duration;

use futures::future::{BoxFuture, FutureExt};
use jiff::Timestamp;
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{DeleteOptions, Preconditions};

use super::Term;
use super::api::Api;
use super::informer::Informer;
use super::object::Key;
use super::owner::enqueue_self;
use super::queue::Queue;
use super::resource::JOBS;
use super::runner::{Controller, Next, Reconcile, ReconcileError};

/// Starts the loop.
pub fn start(term: &Term) {
    let (queue, jobs) = (Arc::new(Queue::default()), term.informers.of(&JOBS));
    let subscriptions = vec![enqueue_self(&queue, &jobs)];
    let reconcile = Arc::new(Expired { api: term.api("ttl-after-finished-controller"), jobs: jobs.clone() });
    term.start(Controller {
        name: "ttl-after-finished",
        queue,
        concurrency: 4,
        needs: vec![jobs],
        subscriptions,
        reconcile,
    });
}

struct Expired {
    api: Api,
    jobs: Arc<Informer>,
}

/// When the Job is to go; `None` while it runs or when it stays.
fn expires(job: &Job) -> Option<i64> {
    let seconds = job.spec.as_ref()?.ttl_seconds_after_finished?;
    let mut conditions = job.status.as_ref()?.conditions.iter().flatten();
    let ended = conditions.find(|one| one.status == "True" && (one.type_ == "Complete" || one.type_ == "Failed"))?;
    Some(ended.last_transition_time.as_ref()?.0.as_second() + i64::from(seconds))
}

impl Reconcile for Expired {
    fn reconcile<'a>(&'a self, key: &'a Key) -> BoxFuture<'a, Result<Next, ReconcileError>> {
        async move {
            let Some(object) = self.jobs.get(key).filter(|job| job.deleting.is_none()) else { return Ok(Next::Done) };
            let Some(expires) = expires(&object.decode()?) else { return Ok(Next::Done) };
            let left = expires - Timestamp::now().as_second();
            if left > 0 {
                return Ok(Next::After(Duration::from_secs(u64::try_from(left).unwrap_or(0))));
            }
            let options = DeleteOptions {
                propagation_policy: Some("Foreground".to_owned()),
                preconditions: Some(Preconditions {
                    uid: Some(object.uid.to_string()),
                    // Someone who raised the time meanwhile saves the Job.
                    resource_version: Some(object.resource_version.to_string()),
                }),
                ..DeleteOptions::default()
            };
            self.api.delete_with(&super::resource::JOBS, key, &object.uid, &options).await?;
            Ok(Next::Done)
        }
        .boxed()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn only_an_ended_job_with_a_time_to_live_expires() {
        let job = |status: &str, ttl: Option<i32>| -> Job {
            serde_json::from_value(
                json!({"spec": {"ttlSecondsAfterFinished": ttl, "template": {}}, "status": {"conditions": [
                {"type": "Complete", "status": status, "lastTransitionTime": "1970-01-01T00:01:00Z"}]}}),
            )
            .unwrap()
        };
        assert_eq!(expires(&job("True", Some(5))), Some(65));
        assert_eq!((expires(&job("False", Some(5))), expires(&job("True", None))), (None, None));
    }
}
