"""The programs that are tried, as data: servers, and clients that ask them.

Commands are shell text, run by `sh -eu`.  They find in their environment:

    TO      the address that the client asks: the server's own, or the relay's
    SERVER  the server's own address
    DIR     a directory of the server's, which the client can read, too
    HERE    an empty directory for this one run of the client
    PYTHON  an interpreter that has the packages of PYPI
    PEERS   the directory of our own small servers and clients

What a client prints must have a match for each pattern of `shows`, and the matched text must be the
same through the relay as directly; a part that may differ lies in a look-ahead.
"""

from dataclasses import dataclass
from typing import Literal

Transport = Literal["tcp", "udp"]

PYPI = {"aioquic": "1.2.0", "websockets": "13.1"}
"""Packages that aren't Debian's, with the versions that are tried."""


@dataclass(frozen=True, slots=True)
class Server:
    """What answers.  `setup` runs once, then `serve`, which stays until it is ended.

    It runs with a /run of its own.  `services` are what the relay is told to relay; it is ready once
    the first port of each of them is bound, or those of `ready`, in which a word that is no service
    is a file in DIR.
    """

    package: str
    """What it is called in the table, and the package that its version is the version of."""
    services: tuple[str, ...]
    serve: str
    setup: str = ""
    packages: tuple[str, ...] = ()
    """What else it needs."""
    ready: tuple[str, ...] | None = None
    seconds: float = 20.0
    """After so long it must be ready."""


@dataclass(frozen=True, slots=True)
class Client:
    """A program that asks, and how it is seen that it was answered."""

    name: str
    package: str
    server: str
    transport: Transport
    ask: str
    shows: tuple[str, ...]
    hides: tuple[str, ...] = ()
    """Patterns that must match nothing: what the program says when it lost something."""
    packages: tuple[str, ...] = ()
    seconds: float = 20.0
    """After so long it is ended, and has failed."""
    note: str = ""
    """What somebody who relays this must know."""
    fails: str = ""
    """Why it can't work through a relay, if that is known; the table then says so."""
    fails_in: tuple[str, ...] = ()
    """In which ways, by a word of theirs; none: in all."""
    needs: str = ""
    """Shell text that fails where this machine can't run it, and says why."""


CERTIFICATE = (
    "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=server.example"
    " -addext subjectAltName=DNS:server.example"
    " -keyout $DIR/key.pem -out $DIR/cert.pem 2>$DIR/openssl.log\n"
)
BLOB = "head -c 8000000 /dev/urandom >$DIR/blob\n"
SAME = "cmp $HERE/blob $DIR/blob && echo same bytes"
SSH = "-F none -i $DIR/user -o UserKnownHostsFile=/dev/null -o StrictHostKeyChecking=no -o LogLevel=ERROR"

SERVERS = {
    # The web
    "nginx": Server(
        "nginx",
        ("tcp/80", "tcp/443"),
        "exec nginx -c $DIR/nginx.conf -e $DIR/error.log",
        f"mkdir $DIR/www; {CERTIFICATE}{BLOB}mv $DIR/blob $DIR/www; ln -s www/blob $DIR/blob\n"
        "echo hello there >$DIR/www/index.html\n"
        "export HOME=$DIR GIT_CONFIG_NOSYSTEM=1; git init -q --bare $DIR/www/repo.git\n"
        "git clone -q $DIR/www/repo.git $DIR/work 2>/dev/null; cp $DIR/blob $DIR/work/blob\n"
        "cd $DIR/work; git add blob; git -c user.name=a -c user.email=a@b commit -qm first\n"
        "git push -q origin HEAD; git -C $DIR/www/repo.git update-server-info\n"
        "cat >$DIR/nginx.conf <<END\n"
        "user root; daemon off; worker_processes 1; pid $DIR/pid; error_log $DIR/error.log;\n"
        "events { worker_connections 1024; }\n"
        "http { access_log off; default_type text/plain; client_max_body_size 0;\n"
        "  client_body_temp_path $DIR/body; proxy_temp_path $DIR/proxy;\n"
        "  fastcgi_temp_path $DIR/fastcgi; uwsgi_temp_path $DIR/uwsgi; scgi_temp_path $DIR/scgi;\n"
        "  server { listen 80; listen 443 ssl http2; root $DIR/www; dav_methods PUT;\n"
        "    ssl_certificate $DIR/cert.pem; ssl_certificate_key $DIR/key.pem; } }\n"
        "END\n",
        packages=("openssl", "git"),
    ),
    "tinyproxy": Server(
        "tinyproxy",
        ("tcp/8888",),
        "$PYTHON -m http.server --bind 127.0.0.1 --directory $DIR 8000 2>/dev/null &\n"
        "exec tinyproxy -d -c $DIR/conf",
        f"{BLOB}printf 'Port 8888\\nTimeout 60\\nMaxClients 20\\n' >$DIR/conf",
        ready=("tcp/8888", "tcp/8000"),
    ),
    "dante": Server(
        "dante-server",
        ("tcp/1080",),
        "$PYTHON -m http.server --bind 127.0.0.1 --directory $DIR 8000 2>/dev/null &\n"
        "exec danted -f $DIR/conf",
        f"{BLOB}cat >$DIR/conf <<END\n"
        "logoutput: stderr\ninternal: 0.0.0.0 port = 1080\nexternal: lo\n"
        "clientmethod: none\nsocksmethod: none\nuser.privileged: root\nuser.unprivileged: nobody\n"
        "client pass { from: 0.0.0.0/0 to: 0.0.0.0/0 }\n"
        "socks pass { from: 0.0.0.0/0 to: 0.0.0.0/0 }\nEND\n",
        ready=("tcp/1080", "tcp/8000"),
    ),
    "quic": Server(
        "aioquic",
        ("udp/4433",),
        "exec $PYTHON $PEERS/quic_server.py 4433 $DIR/cert.pem $DIR/key.pem",
        CERTIFICATE,
        packages=("openssl",),
    ),
    "websocket": Server(
        "websockets", ("tcp/8765",), "exec $PYTHON $PEERS/websocket_server.py 8765"
    ),
    # Shells, files and repositories
    "sshd": Server(
        "openssh-server",
        ("tcp/22", "udp/60001"),
        "mkdir -p /run/sshd; exec /usr/sbin/sshd -D -e -f $DIR/conf",
        f"{BLOB}for k in host user; do ssh-keygen -q -t ed25519 -N '' -f $DIR/$k; done\n"
        "cp $DIR/user.pub $DIR/authorized\n"
        "cat >$DIR/conf <<END\n"
        "Port 22\nListenAddress 0.0.0.0\nHostKey $DIR/host\nAuthorizedKeysFile $DIR/authorized\n"
        "PermitRootLogin prohibit-password\nStrictModes no\nUsePAM no\nPidFile none\n"
        "MaxStartups 100\nUseDNS no\nSubsystem sftp internal-sftp\nEND\n",
        ready=("tcp/22",),
    ),
    "rsyncd": Server(
        "rsync",
        ("tcp/873",),
        "exec rsync --daemon --no-detach --config=$DIR/conf",
        f"{BLOB}printf '[files]\\npath = %s\\nuid = root\\nuse chroot = no\\n' $DIR >$DIR/conf",
    ),
    "git": Server(
        "git",
        ("tcp/9418",),
        "export HOME=$DIR; exec git daemon --reuseaddr --export-all --base-path=$DIR --enable=receive-pack",
        f"{BLOB}export HOME=$DIR; git init -q --bare $DIR/repo.git\n"
        "git config --global --add safe.directory '*'\n"
        "git clone -q $DIR/repo.git $DIR/work 2>/dev/null; cp $DIR/blob $DIR/work/blob\n"
        "cd $DIR/work; git add blob; git -c user.name=a -c user.email=a@b commit -qm first\n"
        "git push -q origin HEAD\n",
    ),
    "svn": Server(
        "subversion",
        ("tcp/3690",),
        "exec svnserve -d --foreground -r $DIR",
        f"{BLOB}svnadmin create $DIR/repo; svn import -q -m first $DIR/blob file://$DIR/repo/blob",
    ),
    "hg": Server(
        "mercurial",
        ("tcp/8000",),
        "exec env HGRCPATH= hg -R $DIR/repo serve -a 0.0.0.0 -p 8000",
        f"{BLOB}export HGRCPATH=; hg init $DIR/repo; cp $DIR/blob $DIR/repo/blob\n"
        "hg -R $DIR/repo commit -q -A -u a -m first",
    ),
    "vsftpd": Server(
        "vsftpd",
        ("tcp/21", "tcp/30000-30009"),
        "exec vsftpd $DIR/conf",
        f"mkdir $DIR/files $DIR/empty; {BLOB}cp $DIR/blob $DIR/files/blob\n"
        "cat >$DIR/conf <<END\n"
        "listen=YES\nbackground=NO\nanonymous_enable=YES\nanon_root=$DIR/files\nno_anon_password=YES\n"
        "secure_chroot_dir=$DIR/empty\npasv_min_port=30000\npasv_max_port=30009\n"
        "connect_from_port_20=YES\nseccomp_sandbox=NO\nEND\n",
        ready=("tcp/21",),
    ),
    "tftpd": Server(
        "tftpd-hpa",
        ("udp/69+any-port",),
        "exec in.tftpd --foreground --ipv4 --address 0.0.0.0:69 --secure $DIR",
        "head -c 1000000 /dev/urandom >$DIR/blob; chmod 644 $DIR/blob",
    ),
    "smbd": Server(
        "samba",
        ("tcp/445",),
        "mkdir -p /run/samba; exec smbd --foreground --no-process-group --debug-stdout"
        " --configfile=$DIR/conf",
        f"mkdir $DIR/state; {BLOB}cat >$DIR/conf <<END\n"
        "[global]\nmap to guest = bad user\nserver role = standalone\nsmb ports = 445\n"
        "lock directory = $DIR/state\nstate directory = $DIR/state\ncache directory = $DIR/state\n"
        "private dir = $DIR/state\npid directory = $DIR/state\nncalrpc dir = $DIR/state\n"
        "log file = $DIR/log.%m\nguest account = root\nload printers = no\ndisable spoolss = yes\n"
        "[files]\npath = $DIR\nguest ok = yes\nEND\n",
    ),
    "ganesha": Server(
        "nfs-ganesha",
        ("tcp/2049",),
        "mkdir -p /run/ganesha; exec ganesha.nfsd -F -L STDERR -p $DIR/pid -f $DIR/conf",
        f"mkdir $DIR/files; {BLOB}cp $DIR/blob $DIR/files/blob; cat >$DIR/conf <<END\n"
        "NFS_CORE_PARAM { NFS_Port = 2049; Protocols = 4; Enable_NLM = false;"
        " Enable_RQUOTA = false; }\n"
        "NFSv4 { Grace_Period = 1; Lease_Lifetime = 2; RecoveryRoot = $DIR/state; }\n"
        "EXPORT { Export_Id = 1; Path = $DIR/files; Pseudo = /files; Access_Type = RW;"
        " Squash = No_Root_Squash; Protocols = 4; Transports = TCP; SecType = sys;"
        " FSAL { Name = VFS; } }\nEND\n"
        "mkdir $DIR/state",
        packages=("nfs-ganesha-vfs",),
    ),
    "nbd": Server(
        "nbd-server",
        ("tcp/10809",),
        "nbd-server -C $DIR/conf -p $DIR/pid; n=0\n"
        "until [ -s $DIR/pid ]; do n=$((n + 1)); [ $n -lt 100 ]; sleep 0.1; done\n"
        "exec tail -f /dev/null --pid=$(cat $DIR/pid)",
        f"{BLOB}printf '[generic]\\n[disk]\\nexportname = %s\\nreadonly = true\\n' $DIR/blob >$DIR/conf",
    ),
    "tgtd": Server(
        "tgt",
        ("tcp/3260",),
        "mkdir -p /run/tgtd; tgtd -f & n=0\n"
        "until tgtadm --op new --mode target --tid 1 -T iqn.2024-01.example:disk 2>/dev/null; do\n"
        "  n=$((n + 1)); [ $n -lt 100 ]; sleep 0.1; done\n"
        "tgtadm --op new --mode logicalunit --tid 1 --lun 1 -b $DIR/blob\n"
        "tgtadm --op bind --mode target --tid 1 -I ALL; touch $DIR/ready; wait",
        "head -c 8388608 /dev/urandom >$DIR/blob",
        ready=("tcp/3260", "ready"),
    ),
    # Names and time
    "nsd": Server(
        "nsd",
        ("udp/53", "tcp/53"),
        "exec nsd -d -c $DIR/conf",
        "cat >$DIR/zone <<'END'\n"
        "$ORIGIN lab.example.\n$TTL 60\n"
        "@ SOA ns root 1 3600 600 86400 60\n@ NS ns\nns A 192.0.2.1\nwww A 192.0.2.80\nwww AAAA 2001:db8::80\n"
        "END\n"
        'n=0; while [ $n -lt 20 ]; do n=$((n + 1)); echo "big TXT \\"$n $(printf \'%0200d\' $n)\\""; done'
        " >>$DIR/zone\n"
        'n=0; while [ $n -lt 500 ]; do n=$((n + 1)); echo "h$n A 192.0.2.2"; done >>$DIR/zone\n'
        "cat >$DIR/conf <<END\n"
        'server:\n ip-address: 0.0.0.0@53\n username: ""\n zonesdir: "$DIR"\n database: ""\n'
        ' pidfile: ""\n xfrdfile: "$DIR/xfrd"\n zonelistfile: "$DIR/list"\n xfrdir: "$DIR"\n'
        " rrl-ratelimit: 0\n"
        "remote-control:\n control-enable: no\n"
        "zone:\n name: lab.example\n zonefile: zone\n provide-xfr: 0.0.0.0/0 NOKEY\n"
        "END\n",
    ),
    "chronyd": Server(
        "chrony",
        ("udp/123",),
        "exec chronyd -d -x -U -f $DIR/conf",
        "printf 'local stratum 5\\nallow\\ncmdport 0\\nbindcmdaddress /\\npidfile %s/pid\\n' $DIR"
        " >$DIR/conf",
    ),
    # Streams of bytes and datagrams
    "socat": Server(
        "socat",
        ("tcp/7", "udp/7"),
        "socat TCP-LISTEN:7,fork,reuseaddr EXEC:cat & exec socat UDP-RECVFROM:7,fork EXEC:cat",
        BLOB,
    ),
    "iperf3": Server("iperf3", ("tcp/5201", "udp/5201"), "exec iperf3 -s", ready=("tcp/5201",)),
    "gnutls": Server(
        "gnutls-bin",
        ("udp/5556",),
        "exec gnutls-serv --quiet --udp --echo --port 5556 --x509certfile $DIR/cert.pem"
        " --x509keyfile $DIR/key.pem",
        CERTIFICATE,
        packages=("openssl",),
    ),
    # Data
    "redis": Server(
        "redis-server",
        ("tcp/6379",),
        "exec redis-server --port 6379 --protected-mode no --save '' --dir $DIR",
    ),
    "memcached": Server("memcached", ("tcp/11211",), "exec memcached -u root -l 0.0.0.0"),
    "postgres": Server(
        "postgresql-15",
        ("tcp/5432",),
        "cd /usr/lib/postgresql/*/bin; exec setpriv --reuid postgres --regid postgres --clear-groups"
        " ./postgres -D $DIR/data -k $DIR -h 0.0.0.0",
        "chown postgres:postgres $DIR; cd /usr/lib/postgresql/*/bin\n"
        "setpriv --reuid postgres --regid postgres --clear-groups"
        " ./initdb -D $DIR/data -A trust -U postgres >$DIR/initdb.log\n"
        "echo 'host all all 0.0.0.0/0 trust' >>$DIR/data/pg_hba.conf",
        packages=("postgresql",),
        seconds=40.0,
    ),
    "mariadb": Server(
        "mariadb-server",
        ("tcp/3306",),
        "exec mariadbd --no-defaults --user=mysql --datadir=$DIR/data --socket=$DIR/socket"
        " --pid-file=$DIR/pid --bind-address=0.0.0.0 --skip-grant-tables --skip-name-resolve",
        "mkdir $DIR/data; chown mysql:mysql $DIR $DIR/data\n"
        "mariadb-install-db --no-defaults --user=mysql --datadir=$DIR/data >$DIR/install.log 2>&1",
        seconds=40.0,
    ),
    "etcd": Server(
        "etcd-server",
        ("tcp/2379",),
        "exec etcd --data-dir $DIR/data --listen-client-urls http://0.0.0.0:2379"
        " --advertise-client-urls http://$SERVER:2379 --listen-peer-urls http://127.0.0.1:2380",
    ),
    "slapd": Server(
        "slapd",
        ("tcp/389",),
        "exec /usr/sbin/slapd -d 0 -u root -h ldap://0.0.0.0:389 -f $DIR/conf",
        "mkdir $DIR/data; cat >$DIR/conf <<END\n"
        "include /etc/ldap/schema/core.schema\nmodulepath /usr/lib/ldap\nmoduleload back_mdb\n"
        "pidfile $DIR/pid\ndatabase mdb\nsuffix dc=lab,dc=example\ndirectory $DIR/data\nEND\n"
        "{ printf 'dn: dc=lab,dc=example\\nobjectClass: dcObject\\nobjectClass: organization\\n'\n"
        "printf 'dc: lab\\no: lab\\n'; n=0; while [ $n -lt 200 ]; do n=$((n + 1))\n"
        "printf '\\ndn: ou=u%d,dc=lab,dc=example\\nobjectClass: organizationalUnit\\nou: u%d\\n' $n $n\n"
        "done; } | /usr/sbin/slapadd -f $DIR/conf 2>$DIR/slapadd.log",
    ),
    # Messages and management
    "mosquitto": Server(
        "mosquitto",
        ("tcp/1883",),
        "exec mosquitto -c $DIR/conf",
        "printf 'listener 1883 0.0.0.0\\nallow_anonymous true\\nuser root\\n' >$DIR/conf",
    ),
    "smtpd": Server(
        "opensmtpd",
        ("tcp/25",),
        "exec smtpd -d -f $DIR/conf",
        "echo 'root: root' >$DIR/aliases; cat >$DIR/conf <<END\n"
        "table aliases file:$DIR/aliases\nlisten on 0.0.0.0 port 25 hostname mail.lab.example\n"
        'action keep maildir "$DIR/mail" alias <aliases>\n'
        "match from any for domain lab.example action keep\nEND\n",
    ),
    "dovecot": Server(
        "dovecot-imapd",
        ("tcp/143",),
        "exec dovecot -F -c $DIR/conf",
        "mkdir -p $DIR/mail/cur $DIR/mail/new $DIR/mail/tmp; chown -R nobody $DIR/mail\n"
        "printf 'Subject: hello there\\n\\n' >$DIR/mail/new/1\n"
        "head -c 300000 /dev/urandom | base64 >>$DIR/mail/new/1; chown nobody $DIR/mail/new/1\n"
        "cat >$DIR/conf <<END\n"
        "base_dir = $DIR/run\nlog_path = /dev/stderr\nprotocols = imap\nssl = no\n"
        "disable_plaintext_auth = no\nfirst_valid_uid = 1\nmail_location = maildir:$DIR/mail\n"
        "passdb {\n driver = static\n args = password=secret\n}\n"
        "userdb {\n driver = static\n args = uid=nobody gid=nogroup home=$DIR/mail\n}\n"
        "service imap-login {\n inet_listener imap {\n  port = 143\n }\n"
        " inet_listener imaps {\n  port = 0\n }\n}\nEND\n",
    ),
    "ngircd": Server(
        "ngircd",
        ("tcp/6667",),
        "exec ngircd -n -f $DIR/conf",
        "cat >$DIR/conf <<END\n"
        "[Global]\nName = irc.lab.example\nInfo = lab\nPorts = 6667\nListen = 0.0.0.0\n"
        "ServerUID = nobody\nServerGID = nogroup\n[Limits]\nMaxConnectionsIP = 0\n"
        "[Options]\nDNS = no\nIdent = no\nPAM = no\nEND\n",
    ),
    "rsyslogd": Server(
        "rsyslog",
        ("tcp/514", "udp/514"),
        "exec rsyslogd -n -i $DIR/pid -f $DIR/conf",
        "cat >$DIR/conf <<END\n"
        'module(load="imudp")\nmodule(load="imtcp")\n'
        'input(type="imudp" port="514")\ninput(type="imtcp" port="514")\n'
        'action(type="omfile" file="$DIR/messages")\nEND\n',
    ),
    "snmpd": Server(
        "snmpd",
        ("udp/161",),
        "exec snmpd -f -Lo -C -c $DIR/conf -p $DIR/pid udp:161",
        "printf 'rocommunity public\\nsysName lab\\nsysLocation here\\npersistentDir %s\\n' $DIR"
        " >$DIR/conf",
    ),
    "freeradius": Server(
        "freeradius",
        ("udp/1812", "udp/1813"),
        "mkdir -p /run/freeradius; chown freerad /run/freeradius; exec freeradius -f -l stdout"
        " -d $DIR/raddb",
        "cp -r /etc/freeradius/3.0 $DIR/raddb; cd $DIR/raddb; rm mods-enabled/eap sites-enabled/*\n"
        "cat >sites-enabled/lab <<END\n"
        "server lab {\n listen {\n  type = auth\n  ipaddr = *\n  port = 1812\n }\n"
        " listen {\n  type = acct\n  ipaddr = *\n  port = 1813\n }\n"
        " authorize {\n  files\n  pap\n }\n authenticate {\n  Auth-Type PAP {\n   pap\n  }\n }\n}\nEND\n"
        "printf 'client any {\\n ipaddr = 0.0.0.0/0\\n secret = testing123\\n}\\n' >clients.conf\n"
        'printf \'bob Cleartext-Password := "hello"\\n Reply-Message = "hello bob"\\n\''
        " >mods-config/files/authorize\nchown -R freerad $DIR/raddb",
    ),
    "krb5kdc": Server(
        "krb5-kdc",
        ("tcp/88", "udp/88"),
        "export KRB5_CONFIG=$DIR/krb5.conf KRB5_KDC_PROFILE=$DIR/kdc.conf; exec krb5kdc -n -P $DIR/pid",
        "printf '[libdefaults]\\ndefault_realm = LAB.EXAMPLE\\n' >$DIR/krb5.conf\n"
        "cat >$DIR/kdc.conf <<END\n"
        "[kdcdefaults]\n kdc_listen = 88\n kdc_tcp_listen = 88\n[realms]\n LAB.EXAMPLE = {\n"
        "  database_name = $DIR/principal\n  key_stash_file = $DIR/stash\n }\n"
        "[logging]\n kdc = STDERR\nEND\n"
        "export KRB5_CONFIG=$DIR/krb5.conf KRB5_KDC_PROFILE=$DIR/kdc.conf\n"
        "kdb5_util create -s -r LAB.EXAMPLE -P secret >$DIR/log 2>&1\n"
        "kadmin.local -r LAB.EXAMPLE addprinc -pw hello bob >>$DIR/log 2>&1",
        packages=("krb5-admin-server",),
    ),
    "coap": Server(
        "libcoap3-bin", ("udp/5683", "tcp/5683"), "exec coap-server-openssl -A 0.0.0.0 -p 5683"
    ),
    # Calls and tunnels
    "sipp": Server(
        "sip-tester",
        ("udp/5060",),
        "cd $DIR; exec sipp -sn uas -i $SERVER -p 5060 -nostdin",
    ),
    "sipp-tcp": Server(
        "sip-tester",
        ("tcp/5060",),
        "cd $DIR; exec sipp -sn uas -i $SERVER -p 5060 -t t1 -nostdin",
    ),
    "coturn": Server(
        "coturn",
        ("udp/3478", "tcp/3478"),
        "exec turnserver -n --listening-ip=$SERVER --relay-ip=$SERVER --lt-cred-mech --user=bob:hello"
        " --realm=lab.example --no-tls --no-dtls --no-cli --log-file=stdout --pidfile=$DIR/pid"
        " --userdb=$DIR/users --allow-loopback-peers",
    ),
    "openvpn": Server(
        "openvpn",
        ("udp/1194",),
        "exec openvpn --dev tun --proto udp --port 1194 --ifconfig 10.9.0.1 10.9.0.2 --float"
        " --secret $DIR/secret --cipher AES-256-CBC",
        "openvpn --genkey secret $DIR/secret",
    ),
    "openvpn-tcp": Server(
        "openvpn",
        ("tcp/1194",),
        "exec openvpn --dev tun --proto tcp-server --port 1194 --ifconfig 10.9.0.1 10.9.0.2"
        " --secret $DIR/secret --cipher AES-256-CBC",
        "openvpn --genkey secret $DIR/secret",
    ),
    "wireguard": Server(
        "wireguard-go",
        ("udp/51820",),
        "mkdir -p /run/wireguard; wireguard-go -f wg0 & n=0\n"
        "until [ -S /run/wireguard/wg0.sock ]; do n=$((n + 1)); [ $n -lt 100 ]; sleep 0.1; done\n"
        "wg set wg0 listen-port 51820 private-key $DIR/server.key"
        " peer $(cat $DIR/client.pub) allowed-ips 10.8.0.2/32\n"
        "ip address add 10.8.0.1/24 dev wg0; ip link set wg0 up; touch $DIR/ready; wait",
        "umask 077; for k in server client; do"
        " wg genkey >$DIR/$k.key; wg pubkey <$DIR/$k.key >$DIR/$k.pub; done",
        packages=("wireguard-tools",),
        ready=("udp/51820", "ready"),
    ),
}

OPENVPN = (
    "sleep 1.1; openvpn --dev tun --proto {proto} --remote $TO --port 1194 --ifconfig 10.9.0.2 10.9.0.1"
    " {options}--secret $DIR/secret --cipher AES-256-CBC >$HERE/log 2>&1 & vpn=$!\n"
    "trap 'kill $vpn; wait $vpn' EXIT; n=0\n"
    "until ping -q -c 1 -W 1 10.9.0.1 >/dev/null 2>&1; do n=$((n + 1)); [ $n -lt 8 ]; sleep 0.2; done\n"
    "ping -q -c 20 -i 0.02 -s 1200 10.9.0.1"
)
"""It begins a second later than the last one: what bears the same second is taken for a replay."""
KINIT: tuple[tuple[Transport, int], ...] = (("tcp", 1), ("udp", 1400))
"""The size of a request from which on TCP is taken, for each."""
TUN = "[ -c /dev/net/tun ] || { echo no /dev/net/tun; exit 1; }"

CLIENTS = (
    # The web
    Client(
        "curl, download", "curl", "nginx", "tcp",
        f"curl -sS -o $HERE/blob -w '%{{http_code}} %{{size_download}}\\n' http://$TO/blob; {SAME}",
        (r"^200 8000000$", r"^same bytes$"),
    ),
    Client(
        "curl, upload", "curl", "nginx", "tcp",
        "n=$(basename $HERE); curl -sS -T $DIR/blob -w '%{http_code}\\n' http://$TO/up-$n\n"
        "cmp $DIR/www/up-$n $DIR/blob && echo same bytes; rm $DIR/www/up-$n",
        (r"^201$", r"^same bytes$"),
    ),
    Client(
        "curl, HTTP/2 over TLS", "curl", "nginx", "tcp",
        "curl -sS --cacert $DIR/cert.pem --connect-to server.example:443:$TO:443 -o $HERE/blob"
        f" -w '%{{http_version}} %{{http_code}}\\n' https://server.example/blob; {SAME}",
        (r"^2 200$", r"^same bytes$"),
    ),
    Client(
        "wget, in two parts", "wget", "nginx", "tcp",
        "head -c 3000000 $DIR/blob >$HERE/blob\n"
        f"wget -nv -c -O $HERE/blob http://$TO/blob 2>&1; {SAME}",
        (r"^same bytes$",),
    ),
    Client(
        "BusyBox wget", "busybox-static", "nginx", "tcp",
        f"busybox wget -q -O $HERE/blob http://$TO/blob; {SAME}",
        (r"^same bytes$",),
    ),
    Client(
        "aria2c, four connections", "aria2", "nginx", "tcp",
        f"aria2c -q --no-conf -x4 -s4 -k1M -d $HERE -o blob http://$TO/blob; {SAME}",
        (r"^same bytes$",),
    ),
    Client(
        "ab, 500 requests", "apache2-utils", "nginx", "tcp",
        "ab -q -n 500 -c 10 http://$TO/",
        (r"^Complete requests: +500$", r"^Failed requests: +0$"),
        hides=(r"Non-2xx",),
    ),
    Client(
        "wrk, one second", "wrk", "nginx", "tcp",
        "wrk -t 1 -c 10 -d 1s http://$TO/",
        (r"(?=.*)requests in",),
        hides=(r"Socket errors", r"Non-2xx"),
    ),
    Client(
        "hey, 500 requests", "hey", "nginx", "tcp",
        "hey -n 500 -c 10 http://$TO/",
        (r"\[200\]\s+500 responses",),
        hides=(r"Error distribution",),
    ),
    Client(
        "h2load, 500 requests over TLS", "nghttp2-client", "nginx", "tcp",
        "h2load -n 500 -c 5 -m 10 https://$TO/",
        (r"500 succeeded, 0 failed, 0 errored, 0 timeout",),
    ),
    Client(
        "openssl s_client", "openssl", "nginx", "tcp",
        "echo Q | openssl s_client -connect $TO:443 -servername server.example"
        " -CAfile $DIR/cert.pem 2>&1",
        (r"Verification: OK", r"New, TLSv1\.[23], Cipher is \S+"),
    ),
    Client(
        "gnutls-cli", "gnutls-bin", "nginx", "tcp",
        "echo | gnutls-cli --sni-hostname server.example --verify-hostname server.example"
        " --x509cafile $DIR/cert.pem $TO",
        (r"The certificate is trusted", r"Handshake was completed"),
    ),
    Client(
        "git clone over HTTP", "git", "nginx", "tcp",
        "export HOME=$HERE; git clone -q http://$TO/repo.git $HERE/repo"
        " && cmp $HERE/repo/blob $DIR/blob && echo same bytes",
        (r"^same bytes$",),
    ),
    Client(
        "nmap, what serves", "nmap", "nginx", "tcp",
        "nmap -Pn -n -sV -p 80 $TO",
        (r"^80/tcp +open +http +nginx [\d.]+",),
        seconds=60.0,
    ),
    Client(
        "traceroute by TCP", "traceroute", "nginx", "tcp",
        "traceroute -T -n -q 1 -w 2 -p 80 $TO",
        (r"(?<=\d) +$TO(?= .* ms)",),
        note="a hop less where it is terminated: the relay itself answers",
    ),
    Client(
        "mtr by TCP", "mtr-tiny", "nginx", "tcp",
        "mtr --report --report-wide -n -c 2 -i 0.3 -G 1 --tcp -P 80 $TO",
        (r"$TO +0\.0%",),
        note="a hop less where it is terminated",
    ),
    Client(
        "curl through an HTTP proxy", "curl", "tinyproxy", "tcp",
        f"curl -sS -x http://$TO:8888 -o $HERE/blob http://127.0.0.1:8000/blob; {SAME}",
        (r"^same bytes$",),
    ),
    Client(
        "curl through a SOCKS proxy", "curl", "dante", "tcp",
        f"curl -sS --socks5 $TO:1080 -o $HERE/blob http://127.0.0.1:8000/blob; {SAME}",
        (r"^same bytes$",),
    ),
    Client(
        "aioquic, 4 MB each way", "aioquic", "quic", "udp",
        "$PYTHON $PEERS/quic_client.py $TO 4433 $DIR/cert.pem 4000000",
        (r"^4000000 bytes came back$",),
    ),
    Client(
        "websockets, 200 messages", "websockets", "websocket", "tcp",
        "$PYTHON $PEERS/websocket_client.py $TO 8765",
        (r"^200 messages came back, pong$",),
    ),
    # Shells, files and repositories
    Client(
        "ssh", "openssh-client", "sshd", "tcp",
        f"head -c 3000000 $DIR/blob | ssh {SSH} root@$TO 'cat; exit 7' >$HERE/got || echo status $?\n"
        "head -c 3000000 $DIR/blob | cmp - $HERE/got && echo same bytes",
        (r"^status 7$", r"^same bytes$"),
    ),
    Client(
        "scp", "openssh-client", "sshd", "tcp",
        f"scp -q {SSH} root@$TO:$DIR/blob $HERE/blob; {SAME}",
        (r"^same bytes$",),
    ),
    Client(
        "sftp", "openssh-client", "sshd", "tcp",
        f"echo get $DIR/blob $HERE/blob | sftp -q -b - {SSH} root@$TO; {SAME}",
        (r"^same bytes$",),
    ),
    Client(
        "rsync over ssh", "rsync", "sshd", "tcp",
        f'rsync -a -e "ssh {SSH}" root@$TO:$DIR/blob $HERE/blob; {SAME}',
        (r"^same bytes$",),
        packages=("openssh-client",),
    ),
    Client(
        "mosh", "mosh", "sshd", "udp",
        f'export LC_ALL=C.UTF-8 TERM=xterm; script -qec "stty rows 24 cols 80; mosh --bind-server=any -p 60001'
        f" --ssh='ssh {SSH}' root@$TO -- sh -c 'sleep 1; echo shell at the other end; sleep 1'\""
        " /dev/null </dev/null",
        (r"shell at the other end",),
        packages=("openssh-client", "bsdutils"),
        note="ssh begins it: tcp/22, too, and a port of UDP for each session",
    ),
    Client(
        "rsync, daemon", "rsync", "rsyncd", "tcp",
        f"rsync -a rsync://$TO/files/blob $HERE/blob; {SAME}",
        (r"^same bytes$",),
    ),
    Client(
        "git, clone and push", "git", "git", "tcp",
        "export HOME=$HERE; git clone -q git://$TO/repo.git $HERE/repo; cd $HERE/repo\n"
        "cmp blob $DIR/blob && echo same bytes; n=$(basename $HERE); git checkout -q -b $n; date >new\n"
        "git add new; git -c user.name=a -c user.email=a@b commit -qm second\n"
        "git push -q origin $n; git -C $DIR/repo.git -c safe.directory='*' log --format='pushed %s' -1 $n",
        (r"^same bytes$", r"^pushed second$"),
    ),
    Client(
        "svn", "subversion", "svn", "tcp",
        f"svn checkout -q --config-dir $HERE/conf svn://$TO/repo $HERE/work\n"
        f"mv $HERE/work/blob $HERE/blob; {SAME}",
        (r"^same bytes$",),
    ),
    Client(
        "hg clone", "mercurial", "hg", "tcp",
        f"export HGRCPATH=; hg clone -q http://$TO:8000/ $HERE/work; mv $HERE/work/blob $HERE/blob; {SAME}",
        (r"^same bytes$",),
    ),
    Client(
        "curl, FTP with EPSV", "curl", "vsftpd", "tcp",
        f"curl -sS -o $HERE/blob ftp://$TO/blob; {SAME}",
        (r"^same bytes$",),
        note="the server's passive ports must be services, too: `tcp/21 tcp/30000-30009`",
    ),
    Client(
        "curl, FTP with PASV", "curl", "vsftpd", "tcp",
        f"curl -sS --disable-epsv -o $HERE/blob ftp://$TO/blob; {SAME}",
        (r"^same bytes$",),
        note="PASV names the server's own address; curl connects to the asked one instead",
    ),
    Client(
        "curl, FTP with EPRT (active)", "curl", "vsftpd", "tcp",
        f"curl -sS --ftp-port - -o $HERE/blob ftp://$TO/blob; {SAME}",
        (r"^same bytes$",),
        note="the server connects to the client itself: it needs a route to it",
        fails="with `source` `relay` the server refuses to connect to another than asked it",
        fails_in=("relay",),
    ),
    *(
        Client(
            name, "lftp", "vsftpd", "tcp",
            f"export HOME=$HERE; lftp -c 'set net:timeout 5; set net:max-retries 2; {setting}"
            f" open ftp://'$TO'; get blob -o '$HERE/blob; {SAME}",
            (r"^same bytes$",),
            note="the server's passive ports must be services, too",
            fails=fails,
            fails_in=("relay",) if fails else (),
        )
        for name, setting, fails in (
            ("lftp, EPSV", "set ftp:prefer-epsv yes;", ""),
            (
                "lftp, PASV", "",
                "with `source` `relay` it goes past the relay, to the address that the server names,"
                " and the server refuses another than asked it",
            ),
        )
    ),
    Client(
        "tftp, 1 MB", "tftp-hpa", "tftpd", "udp",
        f"cd $HERE; timeout 12 tftp -4 -m binary $TO -c get blob; {SAME}",
        (r"^same bytes$",),
        seconds=15.0,
        note="its server answers from another port: `udp/69+any-port`",
    ),
    Client(
        "smbclient", "smbclient", "smbd", "tcp",
        f"cd $HERE; smbclient -N //$TO/files -c 'get blob' 2>&1; {SAME}",
        (r"^same bytes$",),
    ),
    Client(
        "nfs-cp (NFSv4)", "libnfs-utils", "ganesha", "tcp",
        f"nfs-cp \"nfs://$TO/files/blob?version=4\" $HERE/blob; {SAME}",
        (r"^same bytes$",),
    ),
    Client(
        "nbdcopy", "libnbd-bin", "nbd", "tcp",
        f"nbdcopy nbd://$TO/disk $HERE/blob; {SAME}",
        (r"^same bytes$",),
    ),
    Client(
        "iscsi-inq", "libiscsi-bin", "tgtd", "tcp",
        "iscsi-inq iscsi://$TO/iqn.2024-01.example:disk/1; iscsi-readcapacity16"
        " iscsi://$TO/iqn.2024-01.example:disk/1",
        (r"Vendor:IET", r"Total size:8388608"),
        note="discovery (`iscsi-ls`) names the server's own address: log in by the relay's",
    ),
    # Names and time
    Client(
        "dig", "bind9-dnsutils", "nsd", "udp",
        "dig +tries=1 +time=3 +noall +comments +answer @$TO www.lab.example",
        (r"status: NOERROR", r"^www\.lab\.example\.\s+60\s+IN\s+A\s+192\.0\.2\.80$"),
        hides=(r"timed out", r"unexpected source"),
    ),
    Client(
        "dig, cut and repeated by TCP", "bind9-dnsutils", "nsd", "udp",
        "dig +tries=1 +time=3 +bufsize=512 @$TO big.lab.example TXT",
        (r"Truncated, retrying in TCP mode", r"ANSWER: 20,", r"MSG SIZE +rcvd: \d+"),
        note="needs both `udp/53` and `tcp/53`",
    ),
    Client(
        "dig, large answer in fragments", "bind9-dnsutils", "nsd", "udp",
        "dig +tries=1 +time=3 +bufsize=4096 +ignore @$TO big.lab.example TXT",
        (r"ANSWER: \d+,",),
    ),
    Client(
        "dig, zone transfer", "bind9-dnsutils", "nsd", "tcp",
        "dig +tries=1 +time=3 +onesoa @$TO lab.example AXFR",
        (r"XFR size: \d+ records",),
    ),
    Client(
        "kdig", "knot-dnsutils", "nsd", "udp",
        "kdig +retry=0 +time=3 @$TO www.lab.example AAAA",
        (r"status: NOERROR", r"AAAA\s+2001:db8::80$"),
    ),
    Client(
        "kdig by TCP", "knot-dnsutils", "nsd", "tcp",
        "kdig +tcp +keepopen +retry=0 +time=3 @$TO www.lab.example A www.lab.example AAAA",
        (r"A\s+192\.0\.2\.80$", r"AAAA\s+2001:db8::80$"),
    ),
    Client(
        "drill", "ldnsutils", "nsd", "udp",
        "drill @$TO www.lab.example",
        (r"rcode: NOERROR", r"A\s+192\.0\.2\.80$"),
    ),
    Client(
        "BusyBox nslookup", "busybox-static", "nsd", "udp",
        "busybox nslookup www.lab.example $TO",
        (r"^Address: 192\.0\.2\.80$", r"^Address: 2001:db8::80$"),
    ),
    Client(
        "dnsperf, one second", "dnsperf", "nsd", "udp",
        "for n in $(seq 500); do echo h$n.lab.example A; done >$HERE/q\n"
        "dnsperf -s $TO -d $HERE/q -l 1 -c 10 -Q 2000",
        (r"Response codes: +NOERROR", r"Queries lost: +0 \(0\.00%\)"),
    ),
    Client(
        "dnsperf by TCP, one second", "dnsperf", "nsd", "tcp",
        "for n in $(seq 500); do echo h$n.lab.example A; done >$HERE/q\n"
        "dnsperf -m tcp -s $TO -d $HERE/q -l 1 -c 10 -Q 2000",
        (r"Response codes: +NOERROR", r"Queries lost: +0 \(0\.00%\)"),
    ),
    Client(
        "traceroute by UDP", "traceroute", "nsd", "udp",
        "traceroute -U -n -q 1 -w 1 -m 4 -p 53 $TO",
        (r"^ 1 +(?=\S)", r"^ 2 +$TO(?= .* ms)"),
    ),
    Client(
        "ntpdate", "ntpsec-ntpdate", "chronyd", "udp",
        "ntpdate -q -u $TO",
        (r"$TO s5 no-leap",),
    ),
    Client(
        "chronyd, asks once", "chrony", "chronyd", "udp",
        "printf 'server %s iburst\\ncmdport 0\\nbindcmdaddress /\\npidfile %s/pid\\n' $TO $HERE >$HERE/conf\n"
        "chronyd -Q -t 10 -U -f $HERE/conf 2>&1",
        (r"System clock wrong by",),
    ),
    # Streams of bytes and datagrams
    Client(
        "socat, echo and half-close", "socat", "socat", "tcp",
        f"socat -t 10 - TCP:$TO:7 <$DIR/blob >$HERE/blob; {SAME}",
        (r"^same bytes$",),
    ),
    Client(
        "socat, datagrams", "socat", "socat", "udp",
        "for n in 1 2 3; do echo hello $n | socat -t 2 - UDP:$TO:7; done",
        (r"^hello 1$", r"^hello 2$", r"^hello 3$"),
    ),
    Client(
        "nc", "netcat-openbsd", "socat", "tcp",
        f"nc.openbsd -N $TO 7 <$DIR/blob >$HERE/blob; {SAME}",
        (r"^same bytes$",),
    ),
    Client(
        "nc, a datagram", "netcat-openbsd", "socat", "udp",
        "echo hello there | nc.openbsd -u -w 1 $TO 7",
        (r"^hello there$",),
    ),
    Client(
        "ncat", "ncat", "socat", "tcp",
        f"ncat $TO 7 <$DIR/blob >$HERE/blob; {SAME}",
        (r"^same bytes$",),
    ),
    Client(
        "iperf3", "iperf3", "iperf3", "tcp",
        "iperf3 -c $TO -t 1 && sleep 0.5 && iperf3 -c $TO -t 1 -R -P 3",
        (r"receiver$", r"iperf Done\."),
    ),
    Client(
        "iperf3 by UDP", "iperf3", "iperf3", "udp",
        "iperf3 -c $TO -u -b 5M -l 1200 -t 1",
        (r" 0/(?=\d\d\d \(0%\) +receiver$)", r"iperf Done\."),
        note="its control connection is TCP: both `tcp/5201` and `udp/5201`",
    ),
    Client(
        "gnutls-cli, DTLS", "gnutls-bin", "gnutls", "udp",
        "echo hello there | gnutls-cli --udp --port 5556 --sni-hostname server.example"
        " --verify-hostname server.example --x509cafile $DIR/cert.pem $TO",
        (r"Handshake was completed", r"DTLS1\.2"),
    ),
    # Data
    Client(
        "redis-cli", "redis-tools", "redis", "tcp",
        "redis-cli -h $TO set a hello; redis-cli -h $TO get a; redis-cli -h $TO --raw eval"
        " 'return string.rep(\"x\", 3000000)' 0 | wc -c",
        (r"^OK$", r"^hello$", r"^3000001$"),
    ),
    Client(
        "redis-benchmark, pipelined", "redis-tools", "redis", "tcp",
        "redis-benchmark -h $TO -n 5000 -c 20 -P 16 -t set,get -q | tr '\\r' '\\n'",
        (r"^SET: (?=\d.* requests per second)", r"^GET: (?=\d.* requests per second)"),
    ),
    Client(
        "memccp, memccat", "libmemcached-tools", "memcached", "tcp",
        "n=$(basename $HERE); echo hello there >$HERE/$n; memccp --servers=$TO $HERE/$n\n"
        "memccat --servers=$TO $n",
        (r"^hello there$",),
    ),
    Client(
        "psql", "postgresql-client-15", "postgres", "tcp",
        "psql -h $TO -U postgres -Atc 'select count(*), sum(length(repeat(n::text, 20)))"
        " from generate_series(1, 20000) n'\n"
        "psql -h $TO -U postgres -Atc 'copy (select generate_series(1, 200000)) to stdout' | md5sum",
        (r"^20000\|\d+$", r"^\w{32}"),
    ),
    Client(
        "pgbench, 200 transactions", "postgresql-15", "postgres", "tcp",
        "cd /usr/lib/postgresql/15/bin; ./pgbench -h $TO -U postgres -i -q postgres 2>/dev/null\n"
        "./pgbench -h $TO -U postgres -n -c 4 -t 50 postgres",
        (r"actually processed: 200/200",),
        hides=(r"failed transactions: [1-9]",),
    ),
    Client(
        "mariadb", "mariadb-client", "mariadb", "tcp",
        "mariadb --no-defaults -h $TO -N -e \"select 6 * 7; select md5(repeat('x', 3000000));"
        " select length(repeat('x', 3000000))\"",
        (r"^42$", r"^\w{32}$", r"^3000000$"),
    ),
    Client(
        "etcdctl", "etcd-client", "etcd", "tcp",
        "export ETCDCTL_API=3; e=\"etcdctl --endpoints=http://$TO:2379\"; $e put a hello; $e get a\n"
        "$e watch b >$HERE/watch & w=$!; trap 'kill $w' EXIT; n=0\n"
        "until grep -q there $HERE/watch; do $e put b there >/dev/null; n=$((n + 1)); [ $n -lt 50 ]; done\n"
        "echo watched",
        (r"^OK$", r"^hello$", r"^watched$"),
    ),
    Client(
        "ldapsearch", "ldap-utils", "slapd", "tcp",
        "ldapsearch -x -LLL -H ldap://$TO -b dc=lab,dc=example '(ou=*)' dn | grep -c ^dn",
        (r"^200$",),
    ),
    # Messages and management
    Client(
        "mosquitto_pub, mosquitto_sub", "mosquitto-clients", "mosquitto", "tcp",
        "mosquitto_pub -h $TO -t a -r -q 1 -m hello; mosquitto_sub -h $TO -t a -q 1 -C 1 -W 5",
        (r"^hello$",),
    ),
    Client(
        "swaks, a mail of 1 MB", "swaks", "smtpd", "tcp",
        "head -c 700000 /dev/urandom | base64 >$HERE/body\n"
        "swaks --server $TO --from a@client.example --to root@lab.example --helo client.example"
        " --body @$HERE/body --hide-all --show-time-lapse i 2>&1; echo status $?",
        (r"^status 0$",),
    ),
    Client(
        "curl, IMAP", "curl", "dovecot", "tcp",
        "curl -sS -u bob:secret -o $HERE/mail 'imap://'$TO'/INBOX;MAILINDEX=1'\n"
        "wc -c <$HERE/mail; grep Subject $HERE/mail",
        (r"^\d{6}$", r"^Subject: hello there"),
    ),
    Client(
        "ii (IRC)", "ii", "ngircd", "tcp",
        "ii -s $TO -n u$(basename $HERE | tr -cd 0-9) -i $HERE & i=$!; trap 'kill $i' EXIT; n=0\n"
        "until grep -qs Welcome $HERE/$TO/out; do n=$((n + 1)); [ $n -lt 80 ]; sleep 0.1; done\n"
        "echo /j '#lab' >$HERE/$TO/in\n"
        "until [ -e $HERE/$TO/#lab/out ]; do n=$((n + 1)); [ $n -lt 160 ]; sleep 0.1; done\n"
        "grep -o 'Welcome to the Internet Relay Network' $HERE/$TO/out; echo joined",
        (r"Welcome to the Internet Relay Network", r"^joined$"),
    ),
    Client(
        "logger", "bsdutils", "rsyslogd", "tcp",
        "m=$(basename $HERE)-tcp; logger -n $TO -P 514 -T $m; n=0\n"
        "until grep -q $m $DIR/messages; do n=$((n + 1)); [ $n -lt 50 ]; sleep 0.1; done; echo logged",
        (r"^logged$",),
    ),
    Client(
        "logger by UDP", "bsdutils", "rsyslogd", "udp",
        "m=$(basename $HERE)-udp; logger -n $TO -P 514 -d $m; n=0\n"
        "until grep -q $m $DIR/messages; do n=$((n + 1)); [ $n -lt 50 ]; sleep 0.1; done; echo logged",
        (r"^logged$",),
    ),
    Client(
        "snmpget, snmpbulkwalk", "snmp", "snmpd", "udp",
        "snmpget -v2c -c public $TO .1.3.6.1.2.1.1.5.0\n"
        "snmpbulkwalk -v2c -c public -Cr50 $TO .1.3.6.1.2.1.1 | grep -c 2.1.1",
        (r"STRING: \"?lab\"?$", r"^\d+$"),
    ),
    Client(
        "radtest", "freeradius-utils", "freeradius", "udp",
        "radtest bob hello $TO 0 testing123; radtest bob wrong $TO 0 testing123 || echo status $?",
        (r"Received Access-Accept", r"hello bob", r"Received Access-Reject", r"^status 1$"),
    ),
    *(
        Client(
            f"kinit by {proto.upper()}", "krb5-user", "krb5kdc", proto,
            "cat >$HERE/krb5.conf <<END\n[libdefaults]\n default_realm = LAB.EXAMPLE\n"
            f" udp_preference_limit = {limit}\n[realms]\n LAB.EXAMPLE = {{\n  kdc = $TO\n }}\nEND\n"
            "export KRB5_CONFIG=$HERE/krb5.conf KRB5CCNAME=$HERE/cache\n"
            "echo hello | kinit bob; klist",
            (r"Default principal: bob@LAB\.EXAMPLE", r"krbtgt/LAB\.EXAMPLE@LAB\.EXAMPLE"),
        )
        for proto, limit in KINIT
    ),
    Client(
        "coap-client", "libcoap3-bin", "coap", "udp",
        "coap-client-openssl -m get coap://$TO/.well-known/core; echo\n"
        "head -c 20000 /dev/zero | tr '\\0' x >$HERE/body\n"
        "coap-client-openssl -m put -f $HERE/body -t text/plain coap://$TO/example_data; coap-client-openssl -m get"
        " coap://$TO/example_data | wc -c",
        (r"</>;title=\"General Info\"", r"^2000\d$"),
    ),
    Client(
        "coap-client by TCP", "libcoap3-bin", "coap", "tcp",
        "coap-client-openssl -m get coap+tcp://$TO/.well-known/core; echo",
        (r"</>;title=\"General Info\"",),
    ),
    # Calls and tunnels
    Client(
        "sipp, five calls", "sip-tester", "sipp", "udp",
        "cd $HERE; export TERM=xterm; sipp -sn uac -m 5 -r 10 -d 100 -i $CLIENT -nostdin $TO:5060"
        " >/dev/null 2>&1; echo status $?",
        (r"^status 0$",),
        note="the calls' media (RTP) needs services of its own",
    ),
    Client(
        "sipp by TCP, five calls", "sip-tester", "sipp-tcp", "tcp",
        "cd $HERE; export TERM=xterm; sipp -sn uac -m 5 -r 10 -d 100 -t t1 -i $CLIENT -nostdin $TO:5060"
        " >/dev/null 2>&1; echo status $?",
        (r"^status 0$",),
        note="the calls' media (RTP) needs services of its own",
    ),
    Client(
        "turnutils_stunclient", "coturn", "coturn", "udp",
        "turnutils_stunclient $TO",
        (r"UDP reflexive addr: (?=\S)",),
        note="it shows what the server sees: with `source` `relay`, the relay",
    ),
    Client(
        "turnutils_uclient", "coturn", "coturn", "udp",
        "turnutils_uclient -y -c -u bob -w hello -n 20 -m 2 -z 10 $TO",
        (r"Total lost packets 0 ",),
        note="the server's relayed addresses are its own, and reached without the relay",
    ),
    Client(
        "turnutils_uclient by TCP", "coturn", "coturn", "tcp",
        "turnutils_uclient -t -y -c -u bob -w hello -n 20 -m 2 -z 10 $TO",
        (r"Total lost packets 0 ",),
    ),
    Client(
        "OpenVPN", "openvpn", "openvpn", "udp",
        OPENVPN.format(proto="udp", options=""),
        (r"20 packets transmitted, 20 received, 0% packet loss",),
        packages=("iputils-ping",),
        needs=TUN,
    ),
    Client(
        "OpenVPN by TCP", "openvpn", "openvpn-tcp", "tcp",
        OPENVPN.format(proto="tcp-client", options="--connect-retry 1 "),
        (r"20 packets transmitted, 20 received, 0% packet loss",),
        packages=("iputils-ping",),
        needs=TUN,
    ),
    Client(
        "WireGuard (wireguard-go)", "wireguard-go", "wireguard", "udp",
        "mount -t tmpfs tmpfs /run; mkdir /run/wireguard; wireguard-go -f wg0 >$HERE/log 2>&1 & w=$!\n"
        "trap 'kill $w; wait $w || :' EXIT; n=0\n"
        "until [ -S /run/wireguard/wg0.sock ]; do n=$((n + 1)); [ $n -lt 100 ]; sleep 0.1; done\n"
        "wg set wg0 private-key $DIR/client.key peer $(cat $DIR/server.pub) endpoint $TO:51820"
        " allowed-ips 10.8.0.1/32\n"
        "ip address add 10.8.0.2/24 dev wg0; ip link set wg0 up\n"
        "ping -q -c 1 -W 5 10.8.0.1 >/dev/null; ping -q -c 20 -i 0.02 -s 1200 10.8.0.1",
        (r"20 packets transmitted, 20 received, 0% packet loss",),
        packages=("wireguard-tools", "iputils-ping"),
        needs=TUN,
    ),
)  # fmt: skip
