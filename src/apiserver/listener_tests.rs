use super::*;
use crate::auth::objects::testing::World;
use crate::auth::pki::{ClusterKeys, Leaf, LeafRequest, Usage, server_leaf};
use crate::auth::{Identity, ServiceAccountTokens};
use bytes::Bytes;
use http_body_util::{BodyExt, Empty, Full};
use rustls_pki_types::ServerName;
use serde_json::Value;
use tower::service_fn;

struct Scene {
    address: SocketAddr,
    keys: Arc<ClusterKeys>,
    protocols: Protocols,
    shutdown: CancellationToken,
    task: tokio::task::JoinHandle<()>,
    _world: World,
}

/// Answers with the caller's name; `/panic` panics, `/hang` never answers.
async fn api(request: Request<Body>) -> Result<Response<Body>, Infallible> {
    match request.uri().path() {
        "/panic" => panic!("handler"),
        "/hang" => std::future::pending().await,
        _ => {
            let name = request.extensions().get::<Identity>().unwrap().user().name.clone();
            assert!(!request.headers().contains_key(header::AUTHORIZATION));
            let length = match request.into_body().collect(MAX_BODY).await {
                Ok(bytes) => bytes.len(),
                Err(error) => return Ok(Status::too_large(error).into_response()),
            };
            Ok(Response::new(Body::full(format!("{name} {length}"))))
        }
    }
}

async fn scene(limits: Limits) -> Scene {
    let world = World::new();
    let keys = Arc::new(ClusterKeys::generate(SystemTime::now()).unwrap());
    let objects = world.objects.clone();
    let tokens = ServiceAccountTokens::new(keys.clone(), objects.clone(), "https://issuer");
    let authenticator = Authenticator::new(&keys, tokens, objects.clone()).unwrap();
    let authorizer = Authorizer::new(objects.store().clone());
    let names = server_leaf::server_names("cluster.local", "n1", &[], &[]);
    let leaf = ServerLeaf::issue(keys.clone(), names, SystemTime::now()).unwrap();
    let any = SocketAddr::from(([127, 0, 0, 1], 0));
    let protocols = Protocols::default();
    let listener = Listener::bind(any, leaf, authenticator, authorizer, limits, protocols.clone()).await.unwrap();
    let address = listener.local_address().unwrap();
    let shutdown = CancellationToken::new();
    let task = tokio::spawn(listener.serve(ApiService::new(service_fn(api)), shutdown.clone()));
    Scene { address, keys, protocols, shutdown, task, _world: world }
}

impl Scene {
    fn certificate(&self, user: &str, group: &str) -> Leaf {
        let request = LeafRequest { common_name: user, organization: Some(group), names: &[], usage: Usage::Client };
        self.keys.client_ca.issue(&request, SystemTime::now()).unwrap()
    }

    async fn tls(&self, leaf: Option<&Leaf>, alpn: &[u8]) -> tokio_rustls::client::TlsStream<TcpStream> {
        let mut roots = rustls::RootCertStore::empty();
        roots.add(self.keys.server_ca.certificate().clone()).unwrap();
        let builder = rustls::ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots);
        let mut config = match leaf {
            Some(leaf) => builder.with_client_auth_cert(vec![leaf.certificate.clone()], leaf.key_der()).unwrap(),
            None => builder.with_no_client_auth(),
        };
        config.alpn_protocols = vec![alpn.to_vec()];
        let stream = TcpStream::connect(self.address).await.unwrap();
        let name = ServerName::try_from("kubernetes.default.svc.cluster.local").unwrap();
        let tls = tokio_rustls::TlsConnector::from(Arc::new(config)).connect(name, stream).await.unwrap();
        assert_eq!(tls.get_ref().1.alpn_protocol(), Some(alpn));
        tls
    }

    /// One request over HTTP/1.1; status and body.
    async fn ask(&self, leaf: Option<&Leaf>, request: Request<Full<Bytes>>) -> (u16, String) {
        let io = TokioIo::new(self.tls(leaf, b"http/1.1").await);
        let (mut sender, connection) = hyper::client::conn::http1::handshake(io).await.unwrap();
        tokio::spawn(connection.with_upgrades());
        let response = sender.send_request(request).await.unwrap();
        let status = response.status().as_u16();
        let body = response.into_body().collect().await.unwrap().to_bytes();
        (status, String::from_utf8_lossy(&body).into_owned())
    }
}

fn get(path: &str) -> Request<Full<Bytes>> {
    Request::get(path).header("host", "kubernetes").body(Full::default()).unwrap()
}

fn status(body: &str) -> Value {
    serde_json::from_str(body).unwrap()
}

#[tokio::test]
async fn the_door_lets_in_who_is_known_and_says_401_to_others() {
    let scene = scene(Limits::default()).await;
    let jane = scene.certificate("jane", "dev");
    assert_eq!(scene.ask(Some(&jane), get("/api")).await, (200, "jane 0".into()));
    let (code, body) = scene.ask(None, get("/api")).await;
    assert_eq!((code, status(&body)["reason"].as_str()), (401, Some("Unauthorized")));
    assert_eq!(scene.ask(None, get("/livez")).await, (200, "system:anonymous 0".into()));
    let basic = Request::get("/livez").header("authorization", "Basic eDp5").body(Full::default()).unwrap();
    assert_eq!(scene.ask(None, basic).await.0, 401);
    // A certificate that another cluster signed is an answer with a status, not a broken handshake.
    let request = LeafRequest { common_name: "x", organization: None, names: &[], usage: Usage::Client };
    let foreign =
        ClusterKeys::generate(SystemTime::now()).unwrap().client_ca.issue(&request, SystemTime::now()).unwrap();
    assert_eq!(scene.ask(Some(&foreign), get("/livez")).await.0, 401);
    let as_root = Request::get("/api").header("impersonate-user", "root").body(Full::default()).unwrap();
    let (code, body) = scene.ask(Some(&jane), as_root).await;
    assert_eq!((code, status(&body)["reason"].as_str()), (403, Some("Forbidden")));
}

#[tokio::test]
async fn http2_serves_many_requests_on_one_connection() {
    let scene = scene(Limits::default()).await;
    let jane = scene.certificate("jane", "dev");
    let io = TokioIo::new(scene.tls(Some(&jane), b"h2").await);
    let (mut sender, connection) = hyper::client::conn::http2::handshake(TokioExecutor::new(), io).await.unwrap();
    tokio::spawn(connection);
    for _ in 0..3 {
        let request = Request::get("https://kubernetes/api").body(Empty::<Bytes>::new()).unwrap();
        assert_eq!(sender.send_request(request).await.unwrap().status(), 200);
    }
}

#[tokio::test]
async fn bodies_above_the_limit_get_413() {
    let scene = scene(Limits::default()).await;
    let jane = scene.certificate("jane", "dev");
    let post = |length: usize| Request::post("/api").header("host", "x").body(Full::from(vec![b'x'; length])).unwrap();
    assert_eq!(scene.ask(Some(&jane), post(MAX_BODY)).await, (200, format!("jane {MAX_BODY}")));
    let declared = Request::post("/api").header("content-length", "3145729").body(Full::default()).unwrap();
    let (code, body) = scene.ask(Some(&jane), declared).await;
    assert_eq!((code, status(&body)["message"].as_str()), (413, Some("Request entity too large: limit is 3145728")));
}

#[tokio::test]
async fn a_panic_in_a_handler_harms_nobody_else() {
    let scene = scene(Limits::default()).await;
    let jane = scene.certificate("jane", "dev");
    let (code, body) = scene.ask(Some(&jane), get("/panic")).await;
    assert_eq!((code, status(&body)["reason"].as_str()), (500, Some("InternalError")));
    assert_eq!(scene.ask(Some(&jane), get("/api")).await.0, 200);
}

#[tokio::test]
async fn shutdown_ends_idle_connections_at_once_and_busy_ones_after_the_drain() {
    let scene = scene(Limits { drain: Duration::from_millis(200), ..Limits::default() }).await;
    let jane = scene.certificate("jane", "dev");
    let io = TokioIo::new(scene.tls(Some(&jane), b"http/1.1").await);
    let (mut sender, connection) = hyper::client::conn::http1::handshake(io).await.unwrap();
    tokio::spawn(connection);
    let busy = tokio::spawn(async move { sender.send_request(get("/hang")).await.is_err() });
    tokio::time::sleep(Duration::from_millis(50)).await;
    scene.shutdown.cancel();
    tokio::time::timeout(Duration::from_secs(5), scene.task).await.unwrap().unwrap();
    assert!(busy.await.unwrap());
    assert!(TcpStream::connect(scene.address).await.is_err());
}

#[tokio::test]
async fn other_protocols_demand_a_certificate_and_are_cut_after_the_api_has_drained() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let scene = scene(Limits::default()).await;
    let node = scene.certificate("system:node:n1", "system:nodes");
    let (ended, mut handled) = tokio::sync::mpsc::channel::<()>(1);
    let handler = move |mut tls: TlsStream, peer: protocols::PeerIdentity, _: SocketAddr| {
        let ended = ended.clone();
        async move {
            let _ended = ended;
            let name = peer.node_name().unwrap_or("?").to_owned();
            tls.write_all(name.as_bytes()).await.unwrap();
            std::future::pending().await
        }
        .boxed()
    };
    scene.protocols.on(protocols::LINK, Arc::new(handler));
    let mut stranger = scene.tls(None, protocols::LINK).await;
    assert!(matches!(stranger.read(&mut [0; 8]).await, Ok(0) | Err(_)), "no certificate");
    let mut unknown = scene.tls(Some(&node), protocols::PEER).await;
    assert!(matches!(unknown.read(&mut [0; 8]).await, Ok(0) | Err(_)), "no handler");
    let mut link = scene.tls(Some(&node), protocols::LINK).await;
    let mut name = [0; 2];
    link.read_exact(&mut name).await.unwrap();
    assert_eq!(&name, b"n1");
    assert!(handled.try_recv().is_err());
    scene.shutdown.cancel();
    tokio::time::timeout(Duration::from_secs(2), scene.task).await.unwrap().unwrap();
    assert!(matches!(link.read(&mut [0; 8]).await, Ok(0) | Err(_)));
}

#[test]
fn long_running_requests_are_told_by_their_url() {
    let is = |method: &str, uri: &str| {
        is_long_running(&Request::builder().method(method).uri(uri).body(Body::empty()).unwrap())
    };
    for uri in [
        "/api/v1/pods?watch=true",
        "/api/v1/pods?limit=1&watch=1",
        "/api/v1/watch/pods",
        "/api/v1/namespaces/a/pods/p/exec?command=x",
        "/api/v1/namespaces/a/pods/p/log?follow=true",
        "/api/v1/namespaces/a/services/s/proxy/x/y",
        "/api/v1/nodes/n/proxy/metrics",
    ] {
        assert!(is("GET", uri), "{uri}");
    }
    for uri in [
        "/api/v1/pods?watch=false",
        "/api/v1/namespaces/a/pods/exec",
        "/apis/apps/v1/deployments",
        "/",
        "/api/v1/namespaces/log/pods",
    ] {
        assert!(!is("GET", uri), "{uri}");
    }
    assert!(!is("DELETE", "/api/v1/pods?watch=true"));
}
