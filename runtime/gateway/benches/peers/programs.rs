//! The proxies: how they are configured, started, looked at and ended.

use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use prost::Message;
use trustformers_gateway::disk::TableFile;
use trustformers_proto::control::v1 as wire;

/// A proxy that was asked to end is killed after this time.
const END_TIMEOUT: Duration = Duration::from_secs(10);

/// A running proxy.
pub(crate) struct Program {
    process: Child,
    record: PathBuf,
}

impl Drop for Program {
    /// nginx has a worker, which its master ends on SIGTERM alone.
    fn drop(&mut self) {
        let family = family(self.id());
        signal("-TERM", &family[..1]);
        let deadline = Instant::now() + END_TIMEOUT;
        while Instant::now() < deadline && !matches!(self.process.try_wait(), Ok(Some(_)) | Err(_)) {
            std::thread::yield_now();
        }
        let left: Vec<u32> = family.into_iter().filter(|id| stat(*id).is_some()).collect();
        if !left.is_empty() {
            signal("-KILL", &left);
            let _status = self.process.wait();
        }
    }
}

fn signal(signal: &str, processes: &[u32]) {
    let ids = processes.iter().map(u32::to_string);
    // One that has ended meanwhile is no error.
    let _status = Command::new("kill").arg(signal).args(ids).stderr(Stdio::null()).status();
}

/// An address on which nothing listens.
pub(crate) fn free_address() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}

impl Program {
    /// Starts a proxy that listens at `listen` and forwards to `pod`, on the core for proxies. None where the
    /// environment names no program for it.
    ///
    /// # Errors
    /// It can't be started.
    pub(crate) fn start(
        name: &str,
        folder: &Path,
        listen: SocketAddr,
        pod: SocketAddr,
    ) -> std::io::Result<Option<Self>> {
        let variable =
            format!("BENCH_{}", if name == "ours" { "GATEWAY".to_owned() } else { name.to_uppercase() });
        let Some(program) = std::env::var_os(variable).filter(|program| !program.is_empty()) else {
            return Ok(None);
        };
        let folder = folder.join(name);
        std::fs::create_dir_all(&folder)?;
        let mut command = match std::env::var("BENCH_PROXY_CORE") {
            Ok(core) if !core.is_empty() => {
                let mut taskset = Command::new("taskset");
                taskset.arg("--cpu-list").arg(core).arg(&program);
                taskset
            }
            _ => Command::new(&program),
        };
        match name {
            "ours" => ours(&mut command, &folder, listen, pod)?,
            "envoy" => {
                let file = folder.join("envoy.yaml");
                std::fs::write(&file, envoy_config(listen, pod))?;
                command.arg("-c").arg(&file).args(["--concurrency", "1", "--log-level", "error"]);
                command.args(["--base-id", &std::process::id().to_string()]);
            }
            "sglang" => {
                command.args(["--host", "127.0.0.1", "--port", &listen.port().to_string()]);
                command.args(["--worker-urls", &format!("http://{pod}"), "--policy", "round_robin"]);
                command.args(["--max-concurrent-requests", "65536", "--log-level", "error"]);
            }
            _ => {
                let file = folder.join("nginx.conf");
                std::fs::write(&file, nginx_config(listen, pod))?;
                command.args(["-e", "stderr", "-c"]).arg(&file).arg("-p").arg(&folder);
            }
        }
        let record = folder.join("record.log");
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(std::fs::File::create(&record)?);
        let process = command.spawn()?;
        note(process.id())?;
        Ok(Some(Self { process, record }))
    }

    /// Its process.
    pub(crate) fn id(&self) -> u32 {
        self.process.id()
    }

    /// A number that it has logged under this name.
    pub(crate) fn printed_number(&self, name: &str) -> Option<f64> {
        let text = std::fs::read_to_string(&self.record).unwrap_or_default();
        let (_, rest) = text.split_once(&format!("\"{name}\":"))?;
        rest.split(|letter: char| !letter.is_ascii_digit() && letter != '.').next()?.parse().ok()
    }

    /// The last of what it wrote, for an error.
    pub(crate) fn last_words(&self) -> String {
        let text = std::fs::read_to_string(&self.record).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(5)..].join("; ")
    }
}

/// Writes the process down, so that the script can end it where this program was killed.
fn note(process: u32) -> std::io::Result<()> {
    use std::io::Write;
    let Some(file) = std::env::var_os("BENCH_PROCESSES") else { return Ok(()) };
    let mut file = std::fs::OpenOptions::new().create(true).append(true).open(file)?;
    writeln!(file, "{process}")
}

fn ours(command: &mut Command, folder: &Path, listen: SocketAddr, pod: SocketAddr) -> std::io::Result<()> {
    let file = TableFile::in_folder(folder).map_err(std::io::Error::other)?;
    file.save(&table(pod).encode_to_vec()).map_err(std::io::Error::other)?;
    // The feed's address has no listener: the saved table serves.
    command.args(["--feed", "http://127.0.0.1:9", "--grpc-address", "127.0.0.1:0"]);
    // Nothing is logged of requests at this level.
    command.args(["--drain-timeout", "1s", "--log-filter", "info", "--log-format", "json"]);
    command.arg("--state-dir").arg(folder).arg("--http-address").arg(listen.to_string());
    Ok(())
}

fn table(pod: SocketAddr) -> wire::RouteTable {
    let endpoint = wire::Endpoint {
        pod_name: "mock".to_owned(),
        pod_uid: "mock".to_owned(),
        address: pod.ip().to_string(),
        http_port: u32::from(pod.port()),
        grpc_port: u32::from(pod.port()),
        ..Default::default()
    };
    let backend = wire::Backend {
        revision: "r1".to_owned(),
        weight: 1,
        endpoints: vec![endpoint],
        ..Default::default()
    };
    let route = wire::Route {
        name: "default/a".to_owned(),
        aliases: vec!["a".to_owned()],
        backends: vec![backend],
        policy: Some(wire::Policy::default()),
        ..Default::default()
    };
    // Without a pod: its requests are held for a moment.
    let waiting = wire::Route {
        name: "default/waiting".to_owned(),
        aliases: vec!["waiting".to_owned()],
        policy: Some(wire::Policy { hold_ms: 1000, hold_requests: 64, ..Default::default() }),
        ..Default::default()
    };
    let version = Some(wire::TableVersion { term: 1, counter: 1 });
    wire::RouteTable { version, routes: vec![route, waiting] }
}

/// HTTP/2 to the pod, as the gateway speaks, and bounds that the open streams do not reach.
fn envoy_config(listen: SocketAddr, pod: SocketAddr) -> String {
    format!(
        r#"static_resources:
  listeners:
  - address: {{socket_address: {{address: 127.0.0.1, port_value: {}}}}}
    filter_chains:
    - filters:
      - name: hcm
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: bench
          stream_idle_timeout: 0s
          route_config:
            virtual_hosts:
            - {{name: all, domains: ["*"], routes: [{{match: {{prefix: "/"}}, route: {{cluster: pod, timeout: 0s}}}}]}}
          http_filters:
          - name: router
            typed_config: {{"@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}}
  clusters:
  - name: pod
    type: STATIC
    circuit_breakers: {{thresholds: [{{max_connections: 65536, max_requests: 65536, max_pending_requests: 65536}}]}}
    typed_extension_protocol_options:
      envoy.extensions.upstreams.http.v3.HttpProtocolOptions:
        "@type": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions
        explicit_http_config: {{http2_protocol_options: {{max_concurrent_streams: 100}}}}
    load_assignment:
      cluster_name: pod
      endpoints:
      - lb_endpoints: [{{endpoint: {{address: {{socket_address: {{address: 127.0.0.1, port_value: {}}}}}}}}}]
"#,
        listen.port(),
        pod.port()
    )
}

/// nginx speaks HTTP/1.1 to the pod: its only way to keep connections. Its folders for temporary files are
/// below the given prefix, because those that it was built with need not exist.
fn nginx_config(listen: SocketAddr, pod: SocketAddr) -> String {
    format!(
        "daemon off;\nworker_processes 1;\npid nginx.pid;\nerror_log stderr crit;\n\
         events {{ worker_connections 65536; }}\n\
         http {{\n  access_log off;\n  client_body_temp_path body;\n  proxy_temp_path proxy;\n\
         fastcgi_temp_path fastcgi;\n  uwsgi_temp_path uwsgi;\n  scgi_temp_path scgi;\n\
         upstream pod {{ server {pod}; keepalive 256; keepalive_requests 1000000; }}\n\
         server {{\n    listen {listen} reuseport;\n    keepalive_requests 1000000;\n    location / {{\n\
         proxy_pass http://pod;\n      proxy_http_version 1.1;\n      proxy_set_header Connection \"\";\n\
         proxy_buffering off;\n      proxy_read_timeout 600s;\n    }}\n  }}\n}}\n"
    )
}

/// The process and its children: nginx works in one.
fn family(process: u32) -> Vec<u32> {
    let mut family = vec![process];
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    for entry in entries {
        let Some(id) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        if stat(id).is_some_and(|fields| fields[1].parse() == Ok(process)) {
            family.push(id);
        }
    }
    family
}

/// The fields of `/proc/ID/stat` behind the name; none of a process that has ended.
fn stat(process: u32) -> Option<Vec<String>> {
    let text = std::fs::read_to_string(format!("/proc/{process}/stat")).ok()?;
    let (_, fields) = text.rsplit_once(") ")?;
    let fields: Vec<String> = fields.split(' ').map(str::to_owned).collect();
    (fields.len() > 13 && fields[0] != "Z").then_some(fields)
}

/// User and system time of a process and its children. Linux counts it in 1/100 s.
pub(crate) fn processor_time(process: u32) -> Duration {
    let ticks = |id| {
        let fields = stat(id).unwrap_or_default();
        let field = |index: usize| fields.get(index).and_then(|text| text.parse::<u64>().ok()).unwrap_or(0);
        field(11) + field(12)
    };
    Duration::from_millis(10 * family(process).into_iter().map(ticks).sum::<u64>())
}

/// Resident memory of a process and its children.
pub(crate) fn resident_mib(process: u32) -> f64 {
    let resident = |id| {
        let text = std::fs::read_to_string(format!("/proc/{id}/status")).unwrap_or_default();
        let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:").map(str::to_owned));
        line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<f64>().ok()).unwrap_or(0.0)
    };
    family(process).into_iter().map(resident).sum::<f64>() / 1024.0
}

/// File descriptors that this process may have open.
pub(crate) fn descriptors() -> usize {
    let text = std::fs::read_to_string("/proc/self/limits").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("Max open files"));
    line.and_then(|line| line.split_whitespace().next()?.parse().ok()).unwrap_or(1024)
}
