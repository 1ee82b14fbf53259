//! Jobs: carries out what [`super::completion`] plans.

use std::collections::HashMap;
use std::sync::Arc;

use futures::future::{BoxFuture, FutureExt, join_all};
use jiff::Timestamp;
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::{EnvVar, EnvVarSource, ObjectFieldSelector, PodTemplateSpec};
use parking_lot::Mutex;
use serde_json::json;

use super::Term;
use super::api::{Api, ApiError, PatchKind};
use super::completion::{Failures, INDEX, INDEX_FAILURES, JobPod, NewPod, TRACKING, is_finished, plan};
use super::event::{EventType, Events};
use super::informer::{Informer, Subscription};
use super::object::{Key, Object};
use super::owner::{claim_all, enqueue_owner, enqueue_self};
use super::queue::Queue;
use super::resource::{JOBS, PODS};
use super::runner::{Controller, Next, Reconcile, ReconcileError};
use super::template::{PodName, controller_reference, pod};

/// Pods created at once at first; doubled after each batch without a failure.
const FIRST_BATCH: usize = 4;

/// Starts the loop over Jobs and the one that frees pods of Jobs that are gone.
pub fn start(term: &Term) {
    let queue = Arc::new(Queue::default());
    let (jobs, pods) = (term.informers.of(&JOBS), term.informers.of(&PODS));
    let api = term.api("job-controller");
    let subscriptions = vec![enqueue_self(&queue, &jobs), enqueue_owner(&queue, &JOBS, &jobs, &pods)];
    let reconcile = Arc::new(Jobs {
        events: term.recorder.events(&api, "job-controller"),
        api: api.clone(),
        jobs: jobs.clone(),
        pods: pods.clone(),
        failures: Mutex::default(),
    });
    let needs = vec![jobs.clone(), pods.clone()];
    term.start(Controller { name: "job", queue, concurrency: 8, needs, subscriptions, reconcile });

    let queue = Arc::new(Queue::default());
    let subscriptions = vec![enqueue_tracked(&queue, &pods), enqueue_pods_of_gone_jobs(&queue, &jobs, &pods)];
    let reconcile = Arc::new(Orphans { api, jobs: jobs.clone(), pods: pods.clone() });
    term.start(Controller {
        name: "job-orphan",
        queue,
        concurrency: 4,
        needs: vec![jobs, pods],
        subscriptions,
        reconcile,
    });
}

fn is_tracked(pod: &Object) -> bool {
    pod.finalizers.iter().any(|finalizer| **finalizer == *TRACKING)
}

fn enqueue_tracked(queue: &Arc<Queue>, pods: &Arc<Informer>) -> Subscription {
    let queue = queue.clone();
    pods.subscribe(move |delta| {
        let Some(pod) = delta.new.as_ref().filter(|pod| is_tracked(pod)) else { return };
        let released = delta.old.as_ref().is_none_or(|old| old.owners != pod.owners);
        if released || pod.deleting.is_some() {
            queue.add(pod.key.clone());
        }
    })
}

fn enqueue_pods_of_gone_jobs(queue: &Arc<Queue>, jobs: &Arc<Informer>, pods: &Arc<Informer>) -> Subscription {
    let (queue, pods) = (queue.clone(), pods.clone());
    jobs.subscribe(move |delta| {
        let Some(job) = delta.old.as_ref().filter(|_| delta.new.is_none()) else { return };
        pods.read().controlled_by(&job.uid).for_each(|pod| queue.add(pod.key.clone()));
    })
}

async fn untrack(api: &Api, pod: &Object) -> Result<(), ApiError> {
    let kept: Vec<&str> = pod.finalizers.iter().map(|one| &**one).filter(|one| *one != TRACKING).collect();
    let patch = json!({"metadata": {
        "uid": &*pod.uid,
        "resourceVersion": pod.resource_version.to_string(),
        "finalizers": kept,
    }});
    if pod.deleting.is_some() && kept.is_empty() {
        // The patch may be the end of the pod: its answer is nothing to remember.
        let path = PODS.object(pod.key.namespace(), pod.key.name());
        let body = serde_json::to_vec(&patch)?;
        return tolerate(api.send(http::Method::PATCH, &path, PatchKind::Merge.media_type(), body).await.map(drop));
    }
    tolerate(api.patch(&PODS, &pod.key, "", PatchKind::Merge, &patch).await.map(drop))
}

fn tolerate(result: Result<(), ApiError>) -> Result<(), ApiError> {
    match result {
        Err(error) if error.is_not_found() => Ok(()),
        other => other,
    }
}

struct Orphans {
    api: Api,
    jobs: Arc<Informer>,
    pods: Arc<Informer>,
}

impl Reconcile for Orphans {
    fn reconcile<'a>(&'a self, key: &'a Key) -> BoxFuture<'a, Result<Next, ReconcileError>> {
        async move {
            let Some(pod) = self.pods.get(key).filter(|pod| is_tracked(pod)) else { return Ok(Next::Done) };
            let owner = pod.controller().filter(|owner| owner.kind == "Job");
            let job = owner.and_then(|owner| self.jobs.get(&Key::new(key.namespace(), &owner.name)));
            let alive = job.filter(|job| owner.is_some_and(|owner| owner.uid == *job.uid));
            let counted_no_more = match alive {
                None => true,
                Some(job) => is_finished(job.decode::<Job>()?.status.as_ref()),
            };
            if counted_no_more {
                untrack(&self.api, &pod).await?;
            }
            Ok(Next::Done)
        }
        .boxed()
    }
}

struct Jobs {
    api: Api,
    events: Events,
    jobs: Arc<Informer>,
    pods: Arc<Informer>,
    /// Failures in a row, by the Job's key; with its uid.
    failures: Mutex<HashMap<Key, (Box<str>, Failures)>>,
}

impl Reconcile for Jobs {
    fn reconcile<'a>(&'a self, key: &'a Key) -> BoxFuture<'a, Result<Next, ReconcileError>> {
        self.sync(key).boxed()
    }
}

impl Jobs {
    async fn sync(&self, key: &Key) -> Result<Next, ReconcileError> {
        let Some(object) = self.jobs.get(key) else {
            self.failures.lock().remove(key);
            return Ok(Next::Done);
        };
        let job: Job = object.decode()?;
        let managed_by = job.spec.as_ref().and_then(|spec| spec.managed_by.as_deref());
        let ours = managed_by.is_none_or(|manager| manager == "kubernetes.io/job-controller");
        if !ours || is_finished(job.status.as_ref()) {
            self.failures.lock().remove(key);
            return Ok(Next::Done);
        }
        let pods = self.pods_of(&object).await?;
        let views: Vec<JobPod> = pods
            .iter()
            .map(|pod| Ok(JobPod { pod: pod.decode()?, facts: pod.pod.clone() }))
            .collect::<Result<_, serde_json::Error>>()?;
        let known = self.failures.lock().get(key).filter(|(uid, _)| *uid == object.uid).map(|(_, failures)| *failures);
        let mut plan = plan(&job, &views, known.unwrap_or_default(), Timestamp::now());
        let by_name: HashMap<&str, &Arc<Object>> = pods.iter().map(|pod| (pod.key.name(), pod)).collect();
        let deleted = self.delete(&object, &plan.delete, &by_name).await;
        let (missing, created) = self.create(&object, &job, &plan.create).await;
        // The counts of the plan are wrong now; the next pass sees what there is.
        deleted?;
        // Where no pod may be created, as in a namespace that is being deleted, those that ended are let go all the same.
        if let Some(active) = plan.status.active.as_mut() {
            *active -= missing;
        }
        plan.status.active = plan.status.active.filter(|active| *active != 0);
        if job.status.as_ref() != Some(&plan.status) {
            match self.api.update_status(&JOBS, &object, &plan.status).await {
                Err(error) if error.is_not_found() => return Ok(Next::Done),
                Err(error) => return Err(error.into()),
                Ok(_) => {}
            }
        }
        self.failures.lock().insert(key.clone(), (object.uid.clone(), plan.failures));
        for (kind, reason, message) in plan.events {
            self.events.tell(&JOBS, &object, kind, reason_name(&reason), message);
        }
        let untracked = plan.untrack.iter().filter_map(|name| by_name.get(name.as_str()));
        for result in join_all(untracked.map(|pod| untrack(&self.api, pod))).await {
            result?;
        }
        created?;
        Ok(plan.after.map_or(Next::Done, Next::After))
    }

    async fn pods_of(&self, job: &Object) -> Result<Vec<Arc<Object>>, ReconcileError> {
        match job.selector.as_deref() {
            Some(selector) => claim_all(&self.api, &JOBS, job, selector, &self.pods).await,
            None => Ok(self.pods.read().controlled_by(&job.uid).cloned().collect()),
        }
    }

    async fn delete(&self, job: &Object, names: &[String], pods: &HashMap<&str, &Arc<Object>>) -> Result<(), ApiError> {
        for name in names {
            let Some(pod) = pods.get(name.as_str()) else { continue };
            self.api.delete(&PODS, &pod.key, &pod.uid).await?;
            self.events.tell(&JOBS, job, EventType::Normal, "SuccessfulDelete", format!("Deleted pod: {name}"));
        }
        Ok(())
    }

    /// Creates pods; also says how many are missing in the end.
    async fn create(&self, object: &Object, job: &Job, wanted: &[NewPod]) -> (i32, Result<(), ApiError>) {
        let mut created = 0;
        let result = self.create_in_batches(object, job, wanted, &mut created).await;
        (i32::try_from(wanted.len() - created).unwrap_or(i32::MAX), result)
    }

    async fn create_in_batches(
        &self,
        object: &Object,
        job: &Job,
        wanted: &[NewPod],
        created: &mut usize,
    ) -> Result<(), ApiError> {
        let Some(spec) = &job.spec else { return Ok(()) };
        let owner = controller_reference(&JOBS, object);
        let (name, namespace) = (object.key.name(), object.key.namespace());
        let mut rest = wanted;
        let mut size = FIRST_BATCH;
        while !rest.is_empty() {
            let (batch, later) = rest.split_at(size.min(rest.len()));
            let bodies: Vec<serde_json::Value> = batch
                .iter()
                .map(|new| {
                    let template = template_for(&spec.template, name, new);
                    let prefix = new.index.map_or_else(|| name.to_owned(), |index| format!("{name}-{index}"));
                    pod(&template, PodName::Prefix(&prefix), namespace, &owner)
                })
                .collect::<Result<_, _>>()?;
            let mut failure = None;
            for result in join_all(bodies.iter().map(|body| self.api.create(&PODS, namespace, body))).await {
                match result {
                    Ok(pod) => {
                        *created += 1;
                        let message = format!("Created pod: {}", pod.key.name());
                        self.events.tell(&JOBS, object, EventType::Normal, "SuccessfulCreate", message);
                    }
                    Err(error) => {
                        if !error.is_namespace_terminating() {
                            let message = format!("Error creating: {error}");
                            self.events.tell(&JOBS, object, EventType::Warning, "FailedCreate", message);
                        }
                        failure = Some(error);
                    }
                }
            }
            if let Some(error) = failure {
                return Err(error);
            }
            rest = later;
            size *= 2;
        }
        Ok(())
    }
}

/// Reasons are few and fixed; events hold them without allocating.
fn reason_name(reason: &str) -> &'static str {
    const REASONS: [&str; 9] = [
        "Completed",
        "Suspended",
        "Resumed",
        "TooManySucceededPods",
        "PodFailurePolicy",
        "BackoffLimitExceeded",
        "DeadlineExceeded",
        "MaxFailedIndexesExceeded",
        "FailedIndexes",
    ];
    REASONS.into_iter().find(|known| *known == reason).unwrap_or("Failed")
}

/// The template with what tracks the pod and tells it its index.
fn template_for(template: &PodTemplateSpec, job: &str, new: &NewPod) -> PodTemplateSpec {
    let mut template = template.clone();
    let metadata = template.metadata.get_or_insert_default();
    let finalizers = metadata.finalizers.get_or_insert_default();
    if !finalizers.iter().any(|finalizer| finalizer == TRACKING) {
        finalizers.push(TRACKING.to_owned());
    }
    let Some(index) = new.index else { return template };
    metadata.labels.get_or_insert_default().insert(INDEX.to_owned(), index.to_string());
    let annotations = metadata.annotations.get_or_insert_default();
    annotations.insert(INDEX.to_owned(), index.to_string());
    if let Some(failures) = new.failures {
        annotations.insert(INDEX_FAILURES.to_owned(), failures.to_string());
    }
    if let Some(spec) = template.spec.as_mut() {
        spec.hostname = Some(format!("{job}-{index}"));
        for container in spec.containers.iter_mut().chain(spec.init_containers.iter_mut().flatten()) {
            let env = container.env.get_or_insert_default();
            if !env.iter().any(|variable| variable.name == "JOB_COMPLETION_INDEX") {
                env.push(index_variable());
            }
        }
    }
    template
}

fn index_variable() -> EnvVar {
    EnvVar {
        name: "JOB_COMPLETION_INDEX".to_owned(),
        value_from: Some(EnvVarSource {
            field_ref: Some(ObjectFieldSelector {
                field_path: format!("metadata.labels['{INDEX}']"),
                ..ObjectFieldSelector::default()
            }),
            ..EnvVarSource::default()
        }),
        ..EnvVar::default()
    }
}
