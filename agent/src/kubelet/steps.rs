//! Carries out the steps of a plan, one after the other: the shell around [`super::plan`].

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use k8s_openapi::api::core::v1::{Container, Pod};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::backoff::Backoffs;
use super::config::{self, ContainerInput, SandboxInput};
use super::containers::{self, ContainerKind};
use super::context::Context;
use super::env::{self, Environment};
use super::events::EventType;
use super::files;
use super::observed::{Observed, WaitReason};
use super::plan::Step;
use super::stop::{self, StopRequest};
use super::{hooks, qos, service_env};
use crate::image::{Image, ImageError, PullPolicy};
use crate::runtime::{ContainerState, LinuxContainerResources, RuntimeError};
use crate::volume::{PodVolumes, subpath};

/// What a worker lends to its steps and gets back.
#[derive(Default)]
pub struct Tools {
    /// The pod's volumes.
    pub volumes: PodVolumes,
    /// Delays after failed pulls, by image.
    pub image_backoffs: Backoffs,
    /// When and why the last pull failed, by image.
    pub image_failures: HashMap<String, (SystemTime, String)>,
}

/// What steps tell while they run.
#[derive(Debug)]
pub enum Progress {
    /// A container has started.
    Started(String),
    /// A container could not be started and is to be tried again after the delay.
    Failed(String, WaitReason, Duration),
}

/// How a run of steps ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// All done or told: plan again at once.
    Complete,
    /// The node failed (a volume, the sandbox): try again after a growing delay.
    Failed,
    /// The pod stops.
    Cancelled,
}

/// The node failed, and has said so.
struct NodeFailure;

/// One run of steps.
pub struct Run {
    /// The node.
    pub context: Arc<Context>,
    /// The pod.
    pub pod: Arc<Pod>,
    /// What the plan was made from.
    pub observed: Observed,
    /// Told while it goes on.
    pub progress: mpsc::UnboundedSender<Progress>,
    /// Stops waiting steps.
    pub cancel: CancellationToken,
}

impl Run {
    /// Carries out `steps`.
    pub async fn steps(&self, steps: Vec<Step>, tools: &mut Tools) -> Ended {
        let mut blocked = false;
        for step in steps {
            if self.cancel.is_cancelled() {
                return Ended::Cancelled;
            }
            let result = match step {
                Step::StopPod => self.stop_pod().await,
                Step::Remove { id } => self.remove(&id).await,
                Step::CreateSandbox { attempt } => self.create_sandbox(attempt, tools).await,
                Step::Kill { id, name, message, cause } => {
                    let kill = stop::kill(self.context.as_ref(), &self.pod, &id, &name, &message, cause);
                    tokio::select! {
                        result = kill => result.map_err(|_| NodeFailure),
                        () = self.cancel.cancelled() => return Ended::Cancelled,
                    }
                }
                Step::Resize { containers } => self.resize(&containers).await,
                Step::Start { kind, .. } if blocked && kind != ContainerKind::Regular => continue,
                Step::Start { name, kind } => match self.start(&name, kind, tools).await {
                    Ok(()) => Ok(()),
                    Err(StartError::Cancelled) => return Ended::Cancelled,
                    Err(StartError::Node) => Err(NodeFailure),
                    Err(StartError::Failed(failure)) => {
                        let _ = self.progress.send(Progress::Failed(name, failure.waiting, failure.retry));
                        blocked |= kind == ContainerKind::Init;
                        continue;
                    }
                },
            };
            if let Err(NodeFailure) = result {
                return if self.cancel.is_cancelled() { Ended::Cancelled } else { Ended::Failed };
            }
        }
        Ended::Complete
    }

    async fn stop_pod(&self) -> Result<(), NodeFailure> {
        let grace = stop::grace(&self.pod);
        let request = StopRequest { context: &self.context, pod: &self.pod, observed: &self.observed, grace };
        tokio::select! {
            result = stop::pod(request) => result.map_err(|_| NodeFailure),
            () = self.cancel.cancelled() => Err(NodeFailure),
        }
    }

    async fn remove(&self, id: &str) -> Result<(), NodeFailure> {
        let found = self.observed.by_id(id);
        let result = self.context.runtime.remove_container(id).await;
        if let Err(error) = result
            && !error.is_not_found()
        {
            tracing::warn!(%error, container = id, "container not removed");
            return Err(NodeFailure);
        }
        if let Some(found) = found {
            files::remove_logs(&self.context.log_dir(&self.pod), found);
        }
        Ok(())
    }

    async fn create_sandbox(&self, attempt: u32, tools: &mut Tools) -> Result<(), NodeFailure> {
        let pod = &self.pod;
        if attempt > 0 && !self.observed.sandboxes.is_empty() {
            let message = "Pod sandbox changed, it will be killed and re-created.";
            self.context.recorder.pod(pod, EventType::Normal, "SandboxChanged", message);
        }
        for sandbox in &self.observed.sandboxes {
            // Its containers keep their logs and statuses; what has stopped needs no sandbox.
            if let Err(error) = self.context.runtime.stop_pod_sandbox(&sandbox.id).await
                && !error.is_not_found()
            {
                tracing::warn!(%error, sandbox = sandbox.id, "sandbox not stopped");
            }
        }
        self.set_up_volumes(tools).await?;
        let names = files::hostname(&self.context, pod).map_err(|message| {
            self.context.recorder.pod(pod, EventType::Warning, "FailedCreatePodSandBox", message);
            NodeFailure
        })?;
        let dns = files::dns(&self.context, pod);
        let input = SandboxInput {
            attempt,
            cgroup_root: &self.context.cgroup_root,
            log_dir: self.context.log_dir(pod),
            hostname: names.hostname.clone(),
            dns: dns.clone(),
        };
        let wanted = config::sandbox(pod, input);
        let made = async {
            let id = self.context.runtime.run_pod_sandbox(&wanted).await.map_err(|error| error.to_string())?;
            let status = self.context.runtime.pod_sandbox_status(&id).await.map_err(|error| error.to_string())?;
            files::write(&self.context, pod, &names, &dns, &status.ips).map_err(|error| error.to_string())
        };
        match made.await {
            Ok(()) => Ok(()),
            Err(error) => {
                let message = format!("Failed to create pod sandbox: {error}");
                self.context.recorder.pod(pod, EventType::Warning, "FailedCreatePodSandBox", message);
                Err(NodeFailure)
            }
        }
    }

    /// Volumes come before the sandbox, as upstream.
    async fn set_up_volumes(&self, tools: &mut Tools) -> Result<(), NodeFailure> {
        let ips = self.observed.ips().to_vec();
        let set_up = tools.volumes.set_up(&self.context.volumes, &self.pod, &ips);
        let failures = tokio::select! {
            failures = set_up => failures,
            () = self.cancel.cancelled() => return Err(NodeFailure),
        };
        for (volume, error) in &failures {
            let message = format!("MountVolume.SetUp failed for volume {volume:?} : {error}");
            self.context.recorder.pod(&self.pod, EventType::Warning, "FailedMount", message);
        }
        if failures.is_empty() { Ok(()) } else { Err(NodeFailure) }
    }

    async fn start(&self, name: &str, kind: ContainerKind, tools: &mut Tools) -> Result<(), StartError> {
        let Some(found) = containers::find(&self.pod, name) else { return Ok(()) };
        let container = found.container.as_ref();
        let sandbox = self.current_sandbox().await?;
        // An agent that has just started knows the sandbox but not its volumes.
        self.set_up_volumes(tools).await.map_err(|_| StartError::Node)?;
        let image = tokio::select! {
            image = self.image(container, tools) => image?,
            () = self.cancel.cancelled() => return Err(StartError::Cancelled),
        };
        let attempt = self.attempt(container);
        let environment = self.environment(container, &sandbox.1).await?;
        let id = self.create(container, kind, attempt, &image, &environment, &sandbox.0, tools).await?;
        self.context.recorder.container(&self.pod, name, EventType::Normal, "Created", "Container created");
        if let Err(error) = self.context.runtime.start_container(&id).await {
            let message = error.to_string();
            let event = format!("Error: {message}");
            self.context.recorder.container(&self.pod, name, EventType::Warning, "Failed", event);
            return Err(Failure::new("RunContainerError", message).into());
        }
        self.context.recorder.container(&self.pod, name, EventType::Normal, "Started", "Container started");
        let _ = self.progress.send(Progress::Started(name.to_owned()));
        self.post_start(container, &id, &sandbox.1).await
    }

    /// The pod's own limits give way first and follow last, so that no order of changes is refused.
    async fn resize(&self, ids: &[(String, String)]) -> Result<(), NodeFailure> {
        let runtime = self.context.runtime.as_ref();
        let Some(sandbox) = self.observed.ready_sandbox() else { return Ok(()) };
        let wanted = qos::pod_resources(&self.pod);
        let open = LinuxContainerResources {
            cpu_quota: Some(-1),
            memory_limit_in_bytes: Some(-1),
            ..LinuxContainerResources::default()
        };
        let result = async {
            runtime.update_pod_sandbox_resources(&sandbox.id, &open).await?;
            for (id, name) in ids {
                let Some(found) = containers::find(&self.pod, name) else { continue };
                let mut resources = qos::container_resources(&self.pod, &found.container, self.context.memory);
                resources.oom_score_adj = None;
                resources.memory_swap_limit_in_bytes = resources.memory_limit_in_bytes;
                runtime.update_container_resources(id, &resources).await?;
            }
            runtime.update_pod_sandbox_resources(&sandbox.id, &wanted).await
        };
        result.await.map_err(|error: RuntimeError| {
            let message = format!("resize of pod failed: {error}");
            self.context.recorder.pod(&self.pod, EventType::Warning, "ResizeError", message);
            NodeFailure
        })
    }

    async fn current_sandbox(&self) -> Result<(String, Vec<IpAddr>), StartError> {
        let filter = crate::runtime::PodSandboxFilter {
            pod_uid: Some(containers::uid(&self.pod).to_owned()),
            ..crate::runtime::PodSandboxFilter::default()
        };
        let sandboxes = self.context.runtime.list_pod_sandboxes(&filter).await.unwrap_or_default();
        let observed = Observed::new(sandboxes, Vec::new());
        match observed.ready_sandbox() {
            Some(sandbox) => Ok((sandbox.id.clone(), sandbox.ips.clone())),
            None => Err(StartError::Node),
        }
    }

    /// The next restart count: also a runtime that forgot the last container must not start at 0 again.
    fn attempt(&self, container: &Container) -> u32 {
        if let Some(found) = self.observed.latest(&container.name) {
            return found.metadata.attempt + 1;
        }
        files::last_log(&self.context.log_dir(&self.pod).join(&container.name)).map_or(0, |last| last + 1)
    }

    async fn image(&self, container: &Container, tools: &mut Tools) -> Result<Image, StartError> {
        let reference = container.image.as_deref().unwrap_or_default();
        let policy = match container.image_pull_policy.as_deref() {
            Some("Always") => PullPolicy::Always,
            Some("Never") => PullPolicy::Never,
            _ => PullPolicy::IfNotPresent,
        };
        let recorder = &self.context.recorder;
        let now = SystemTime::now();
        let event =
            |kind, reason, message: String| recorder.container(&self.pod, &container.name, kind, reason, message);
        if let Some((failed_at, why)) = tools.image_failures.get(reference)
            && let Some(waiting) = tools.image_backoffs.waiting(reference, *failed_at, now)
        {
            event(EventType::Normal, "BackOff", format!("Back-off pulling image {reference:?}"));
            event(EventType::Warning, "Failed", "Error: ImagePullBackOff".to_owned());
            let message = format!("Back-off pulling image {reference:?}: ErrImagePull: {why}");
            return Err(Failure::after("ImagePullBackOff", message, waiting.left).into());
        }
        match self.context.images.resolve(reference, policy).await {
            Ok(image) => {
                tools.image_backoffs.forget(reference);
                tools.image_failures.remove(reference);
                let message = format!("Container image {reference:?} already present on machine");
                event(EventType::Normal, "Pulled", message);
                Ok(image)
            }
            Err(error) => {
                let reason = error.reason();
                let message = error.to_string();
                let (first, text) = match &error {
                    ImageError::NeverPull { .. } => ("ErrImageNeverPull", message.clone()),
                    ImageError::InvalidName { .. } => ("InspectFailed", message.clone()),
                    ImageError::Pull { image, why } => ("Failed", format!("Failed to pull image {image:?}: {why}")),
                    _ => ("Failed", message.clone()),
                };
                event(EventType::Warning, first, text);
                event(EventType::Warning, "Failed", format!("Error: {reason}"));
                if reason != "ErrImagePull" {
                    return Err(Failure::after(reason, message, super::backoff::RESTART_FIRST).into());
                }
                tools.image_backoffs.escalate(reference, now, now);
                tools.image_failures.insert(reference.to_owned(), (now, message.clone()));
                Err(Failure::after(reason, message, Duration::from_secs(1)).into())
            }
        }
    }

    async fn environment(&self, container: &Container, ips: &[IpAddr]) -> Result<Environment, StartError> {
        let pod = &self.pod;
        let config_error = |message: String| {
            let event = format!("Error: {message}");
            self.context.recorder.container(pod, &container.name, EventType::Warning, "Failed", event);
            StartError::from(Failure::new("CreateContainerConfigError", message))
        };
        let links = containers::spec(pod).enable_service_links.unwrap_or(true);
        let (shared, own) = (self.context.volumes.shared_reads(), self.context.volumes.reads(pod));
        let services = service_env::fetch(&shared, containers::namespace(pod), links);
        let sources = env::fetch(&own, pod, container);
        let (services, sources) = futures::future::join(services, sources).await;
        let mut sources = sources.map_err(|error| config_error(error.to_string()))?;
        sources.services = services.map_err(|error| config_error(error.to_string()))?;
        let facts = self.context.node.read().clone();
        let made =
            env::environment(pod, container, &sources, ips, &facts).map_err(|error| config_error(error.to_string()))?;
        for message in &made.invalid {
            let reason = "InvalidEnvironmentVariableNames";
            self.context.recorder.container(pod, &container.name, EventType::Warning, reason, message.clone());
        }
        Ok(made)
    }

    #[allow(clippy::too_many_arguments, reason = "the parts of one call, each made just before")]
    async fn create(
        &self,
        container: &Container,
        kind: ContainerKind,
        attempt: u32,
        image: &Image,
        environment: &Environment,
        sandbox: &str,
        tools: &Tools,
    ) -> Result<String, StartError> {
        let pod = &self.pod;
        let failed = |reason: &str, message: String| {
            let event = format!("Error: {message}");
            self.context.recorder.container(pod, &container.name, EventType::Warning, "Failed", event);
            StartError::from(Failure::new(reason, message))
        };
        let pod_dir = self.context.pod_dir(pod);
        let input = ContainerInput {
            kind,
            attempt,
            image,
            environment,
            volumes: tools.volumes.mounted(),
            pod_dir: &pod_dir,
            seccomp_dir: &self.context.config.agent_dir().join("seccomp"),
            node_memory: self.context.memory,
        };
        let mut setup =
            config::container(pod, container, &input).map_err(|error| failed("CreateContainerConfigError", error))?;
        if let Some(target) = containers::target(pod, &container.name) {
            let running = self.observed.of(target).find(|found| found.state == ContainerState::Running);
            let missing = || failed("CreateContainerConfigError", format!("unable to find target container {target}"));
            setup.config.linux.security_context.pid_target = Some(running.ok_or_else(missing)?.id.clone());
        }
        let message_file = setup.termination_message.clone();
        let sub_paths = setup.sub_paths.clone();
        let name = container.name.clone();
        let prepared = tokio::task::spawn_blocking(move || {
            files::make_termination_message(&message_file).map_err(|error| error.to_string())?;
            for sub_path in &sub_paths {
                if let Err(error) = subpath::bind(&sub_path.root, &sub_path.path, &sub_path.target) {
                    // The details could tell about the node's files.
                    tracing::warn!(%error, "subPath not prepared");
                    return Err(format!(
                        "failed to prepare subPath for volumeMount {:?} of container {name:?}",
                        sub_path.name
                    ));
                }
            }
            Ok(())
        });
        prepared
            .await
            .unwrap_or_else(|error| Err(error.to_string()))
            .map_err(|error| failed("CreateContainerConfigError", error))?;
        self.context.runtime.create_container(sandbox, &setup.config).await.map_err(|error| {
            let reason = match error {
                RuntimeError::Invalid(_) => "CreateContainerConfigError",
                _ => "CreateContainerError",
            };
            failed(reason, error.to_string())
        })
    }

    async fn post_start(&self, container: &Container, id: &str, ips: &[IpAddr]) -> Result<(), StartError> {
        let Some(hook) = container.lifecycle.as_ref().and_then(|hooks| hooks.post_start.as_ref()) else {
            return Ok(());
        };
        let host_ips = self.context.host_ips();
        let target = hooks::Target {
            runtime: self.context.runtime.as_ref(),
            container,
            id,
            ip: config::pod_ips(&self.pod, ips, &host_ips).first().copied(),
        };
        let result = tokio::select! {
            result = hooks::run(hook, &target) => result,
            () = self.cancel.cancelled() => return Err(StartError::Cancelled),
        };
        let Err(error) = result else { return Ok(()) };
        let message = error.to_string();
        // The event must not leak what the hook printed.
        self.context.recorder.container(
            &self.pod,
            &container.name,
            EventType::Warning,
            "FailedPostStartHook",
            "PostStartHook failed",
        );
        let cause = super::plan::KillCause::Other;
        let _ = stop::kill(&self.context, &self.pod, id, &container.name, "FailedPostStartHook", cause).await;
        Err(Failure::new("PostStartHookError", message).into())
    }
}

enum StartError {
    Cancelled,
    Node,
    Failed(Failure),
}

impl From<Failure> for StartError {
    fn from(failure: Failure) -> Self {
        Self::Failed(failure)
    }
}

struct Failure {
    waiting: WaitReason,
    retry: Duration,
}

impl Failure {
    /// The delay after a failed start comes from the container's own backoff where there is a dead container; this one
    /// is for containers that could not be made at all.
    fn new(reason: &str, message: String) -> Self {
        Self::after(reason, message, Duration::from_secs(2))
    }

    fn after(reason: &str, message: String, retry: Duration) -> Self {
        Self { waiting: WaitReason { reason: reason.to_owned(), message }, retry }
    }
}
