//! A node on its own: runs the agent against any API server that a kubeconfig names, until it is interrupted.
//!
//! `node KUBECONFIG DATA_DIR NODE_NAME SHIM HELLO`: SHIM and HELLO are the programs that the `coracle` binary
//! carries inside. The API server cannot reach such a node (no logs, no exec).

use std::path::PathBuf;

use anyhow::{Context, bail};
use coracle_agent::{Access, AgentConfig, node_link, run};
use tokio_util::sync::CancellationToken;

fn main() -> anyhow::Result<()> {
    // Containers are made by this program run again.
    coracle_agent::runtime::helper_main_if_requested();
    tracing_subscriber::fmt().with_env_filter(tracing_subscriber::EnvFilter::from_default_env()).init();
    tokio::runtime::Runtime::new()?.block_on(node())
}

async fn node() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [kubeconfig, data_dir, node_name, shim, hello] = arguments.as_slice() else {
        bail!("usage: node KUBECONFIG DATA_DIR NODE_NAME SHIM HELLO");
    };
    let _ = rustls::crypto::ring::default_provider().install_default();
    let kubeconfig = kube::config::Kubeconfig::read_from(kubeconfig).context("read the kubeconfig")?;
    let kube_config = kube::Config::from_custom_kubeconfig(kubeconfig, &Default::default()).await?;
    let client = kube::Client::try_from(kube_config)?;
    let mut config = AgentConfig::new(PathBuf::from(data_dir), node_name.clone());
    config.shim = Box::leak(std::fs::read(shim).context("read the shim")?.into_boxed_slice());
    config.hello = Box::leak(std::fs::read(hello).context("read the hello program")?.into_boxed_slice());
    let shutdown = CancellationToken::new();
    let (_link, listener) = node_link();
    let access = Access { client, link: Some(listener), servers: None };
    let stop = shutdown.clone();
    tokio::spawn(async move {
        let _ = tokio::signal::ctrl_c().await;
        stop.cancel();
    });
    run(config, access, shutdown).await?;
    Ok(())
}
