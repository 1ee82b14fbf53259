//! The kubelet: the node and its pods in the API, one task per pod, the node's HTTP service.
//!
//! # Layout
//! | module | what it holds |
//! | --- | --- |
//! | [`node`], [`node_sync`], [`addresses`] | the Node object, its registration, status and lease |
//! | [`manager`], [`static_pods`], [`mirror`] | which pods there are: from the API, from files, from durable copies |
//! | [`admission`] | pods that the node refuses (pure) |
//! | [`worker`] | the task of one pod: observe, plan, act, report |
//! | [`observed`], [`plan`] | what is known of a pod, and what to do next (pure) |
//! | [`status`], [`conditions`], [`container_status`] | what the API is told (pure) |
//! | [`steps`], [`stop`] | starting and ending containers |
//! | [`report`] | the patch that brings a status into the API |
//! | [`config`], [`labels`] | what the runtime is asked for (pure) |
//! | [`env`], [`service_env`], [`expansion`], [`field_ref`] | variables of containers |
//! | [`hosts`], [`files`] | hosts, hostname, resolver configuration; termination messages; durable copies |
//! | [`probe`], [`hooks`], [`http_get`] | questions to containers and calls into them |
//! | [`qos`], [`quantity`], [`backoff`], [`containers`] | rules that follow from the specification |
//! | [`events`], [`api`], [`object_watch`] | talking to the API |
//! | [`reads`] | what pods need of the API, with copies for times without a server |
//! | [`server`] | the node's HTTP service: logs, exec, attach, port-forward, statistics |
//! | [`context`] | what all workers share |
//!
//! # Tasks
//! | task | owns | starts | ends |
//! | --- | --- | --- | --- |
//! | manager | the map of workers | with the agent | with the agent |
//! | worker | one pod | when the pod appears | when nothing of it is left, or with the agent |
//! | probe | one question to one container | when it runs | when it ends |
//! | node | Node object and lease | with the agent | with the agent |
//! | events | counts of events | with the agent | with the agent |
//! | object watch | followers of one ConfigMap or Secret | first volume that shows it | last one |

pub mod addresses;
pub mod admission;
pub mod api;
pub mod backoff;
pub mod conditions;
pub mod config;
pub mod container_status;
pub mod containers;
pub mod context;
pub mod env;
pub mod events;
pub mod expansion;
pub mod field_ref;
pub mod files;
pub mod hooks;
pub mod hosts;
pub mod http_get;
pub mod labels;
pub mod manager;
pub mod mirror;
pub mod node;
pub mod node_sync;
pub mod object_watch;
pub mod observed;
pub mod plan;
pub mod probe;
pub mod qos;
pub mod quantity;
pub mod reads;
pub mod report;
pub mod server;
pub mod service_env;
pub mod static_pods;
pub mod status;
pub mod steps;
pub mod stop;
pub mod worker;
