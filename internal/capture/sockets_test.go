package capture

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// socketOf returns a descriptor of our own of the process's socket that has this
// peer (pidfd_getfd(2)).
func (p *process) socketOf(t *testing.T, peer netip.AddrPort) int {
	t.Helper()
	pidfd, err := unix.PidfdOpen(p.pid(), 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(pidfd)
	for _, fd := range p.descriptors(t, "socket:") {
		own, err := unix.PidfdGetfd(pidfd, fd, 0)
		if err != nil {
			continue // closed meanwhile
		}
		if sa, err := unix.Getpeername(own); err == nil && addrPort(sa) == peer {
			t.Cleanup(func() { unix.Close(own) })
			return own
		}
		unix.Close(own)
	}
	t.Fatalf("%s has no connection to %v", p.name, peer)
	return -1
}

func addrPort(sa unix.Sockaddr) netip.AddrPort {
	switch sa := sa.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(sa.Addr), uint16(sa.Port))
	case *unix.SockaddrInet6:
		return netip.AddrPortFrom(netip.AddrFrom16(sa.Addr).Unmap(), uint16(sa.Port))
	}
	return netip.AddrPort{}
}

// descriptors lists those of the process whose target begins with kind.
func (p *process) descriptors(t *testing.T, kind string) (fds []int) {
	t.Helper()
	dir := fmt.Sprintf("/proc/%d/fd/", p.pid())
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if target, err := os.Readlink(dir + e.Name()); err == nil && strings.HasPrefix(target, kind) {
			fd, err := strconv.Atoi(e.Name())
			if err != nil {
				t.Fatal(err)
			}
			fds = append(fds, fd)
		}
	}
	return fds
}

// option is a socket option and its value.
type option struct {
	name          string
	level, number int
	want          int
}

// usual are the options of every connection of ztunnel's.
var usual = []option{
	{"SO_MARK", unix.SOL_SOCKET, unix.SO_MARK, 0x539},
	{"TCP_NODELAY", unix.IPPROTO_TCP, unix.TCP_NODELAY, 1},
	{"SO_KEEPALIVE", unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1},
	{"TCP_KEEPIDLE", unix.IPPROTO_TCP, unix.TCP_KEEPIDLE, 180},
	{"TCP_KEEPINTVL", unix.IPPROTO_TCP, unix.TCP_KEEPINTVL, 180},
	{"TCP_KEEPCNT", unix.IPPROTO_TCP, unix.TCP_KEEPCNT, 9},
	{"TCP_USER_TIMEOUT", unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, 0},
}

func checkOptions(t *testing.T, what string, fd int, options []option) {
	t.Helper()
	for _, o := range options {
		if got, err := unix.GetsockoptInt(fd, o.level, o.number); err != nil || got != o.want {
			t.Errorf("%s: %s is %#x (%v), want %#x", what, o.name, got, err, o.want)
		}
	}
}

// All four connections of a path that is captured on both sides are marked, say
// at once what they have to say, and notice a dead peer in the end.
func TestSocketOptions(t *testing.T) {
	eachPath(t, func(t *testing.T, p path) {
		c, s := p.pair(t)
		say(t, c, "hello")
		hears(t, s, "hello")
		between := local(c) // who calls the server's side
		if p.clientNode != nil {
			checkOptions(t, "outbound, accepted", p.clientNode.zt.socketOf(t, local(c)), usual)
			onward := p.clientNode.zt.socketOf(t, remote(c))
			checkOptions(t, "outbound, onward", onward, usual)
			sa, err := unix.Getsockname(onward)
			if err != nil {
				t.Fatal(err)
			}
			between = addrPort(sa)
		}
		if p.serverNode != nil {
			checkOptions(t, "inbound, accepted", p.serverNode.zt.socketOf(t, between), usual)
			checkOptions(t, "inbound, onward", p.serverNode.zt.socketOf(t, local(s)), usual)
		}
	})
}

// The settings have ztunnel's names.
func TestSocketSettings(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		env  []string
		want []option
	}{
		{
			[]string{"PACKET_MARK=5433", "KEEPALIVE_TIME=7s", "KEEPALIVE_INTERVAL=5s", "KEEPALIVE_RETRIES=3", "USER_TIMEOUT_ENABLED=true"},
			[]option{
				{"SO_MARK", unix.SOL_SOCKET, unix.SO_MARK, 0x1539}, // rules look at the last 12 bits,
				{"SO_KEEPALIVE", unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1},
				{"TCP_KEEPIDLE", unix.IPPROTO_TCP, unix.TCP_KEEPIDLE, 7},
				{"TCP_KEEPINTVL", unix.IPPROTO_TCP, unix.TCP_KEEPINTVL, 5},
				{"TCP_KEEPCNT", unix.IPPROTO_TCP, unix.TCP_KEEPCNT, 3},
				{"TCP_USER_TIMEOUT", unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, 22000},
			},
		},
		{
			[]string{"KEEPALIVE_ENABLED=false"},
			[]option{{"SO_KEEPALIVE", unix.SOL_SOCKET, unix.SO_KEEPALIVE, 0}},
		},
	} {
		n, client, srv := newNode(t, withEnv(tt.env...)), pod(t, 2), pod(t, 3)
		n.add(t, client, "--capture", "redirect")
		l := srv.listen(t, srv.ip4, 0)
		c := client.dial(t, l.addr)
		l.accept(t)
		checkOptions(t, fmt.Sprint("accepted ", tt.env), n.zt.socketOf(t, local(c)), tt.want)
		checkOptions(t, fmt.Sprint("onward ", tt.env), n.zt.socketOf(t, l.addr), tt.want)
	}
}

// An idle connection costs ztunnel two descriptors, also when it has been busy.
func TestIdleConnection(t *testing.T) {
	t.Parallel()
	n, client, srv := newNode(t), pod(t, 2), pod(t, 3)
	n.add(t, client, "--capture", "redirect")
	l := srv.listen(t, srv.ip4, 0)
	talk(t, client, l)
	n.zt.line(t, "outbound")
	sockets, all := len(n.zt.descriptors(t, "socket:")), len(n.zt.descriptors(t, ""))
	const many = 100
	var clients, servers []*net.TCPConn
	for range many {
		clients = append(clients, client.dial(t, l.addr))
		servers = append(servers, l.accept(t))
	}
	for i := range many {
		say(t, clients[i], "x")
		hears(t, servers[i], "x")
	}
	if got := len(n.zt.descriptors(t, "")); got != all+2*many {
		t.Errorf("%d connections cost %d descriptors", many, got-all)
	}
	// Beyond 128 KiB there are pipes, for as long as there is something in them.
	for i := range many {
		much := strings.Repeat("x", 300<<10)
		go clients[i].Write([]byte(much))
		hears(t, servers[i], much)
	}
	waitFor(t, "two descriptors a connection, and a few pipes", func() bool {
		return len(n.zt.descriptors(t, "socket:")) == sockets+2*many && len(n.zt.descriptors(t, "pipe:")) < 20
	})
}

// ztunnel's own table is full: a connection that gets no way onward is reset, and
// told why in the log; then all goes on.
func TestTableFull(t *testing.T) {
	t.Parallel()
	n, client, srv := newNode(t), pod(t, 2), pod(t, 3)
	n.add(t, client, "--capture", "redirect")
	l := srv.listen(t, srv.ip4, 0)
	talk(t, client, l)
	n.zt.line(t, "outbound")

	// Room for two connections and the beginning of a third.
	release := n.zt.limit(t, 5)
	first := client.dial(t, l.addr)
	firstServer := l.accept(t)
	second := client.dial(t, l.addr)
	secondServer := l.accept(t)
	third := client.dial(t, l.addr)
	hearsReset(t, third)
	if got, want := n.zt.line(t, fmt.Sprintf("src.addr=%v ", local(third))), `error="io error: Too many open files (os error 24)"`; !strings.HasSuffix(got, want) {
		t.Errorf("the access line is %s", got)
	}
	third.Close()
	say(t, first, "still here")
	hears(t, firstServer, "still here")
	say(t, secondServer, "I too")
	hears(t, second, "I too")

	release()
	talk(t, client, l)
}

// limit leaves the process so many free descriptors until release is called.
func (p *process) limit(t *testing.T, free int) (release func()) {
	t.Helper()
	used := p.descriptors(t, "")
	most := 0
	for ; free > 0 || slices.Contains(used, most); most++ {
		if !slices.Contains(used, most) {
			free--
		}
	}
	var before unix.Rlimit
	if err := unix.Prlimit(p.pid(), unix.RLIMIT_NOFILE, nil, &before); err != nil {
		t.Fatal(err)
	}
	if err := unix.Prlimit(p.pid(), unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: uint64(most), Max: before.Max}, nil); err != nil {
		t.Fatal(err)
	}
	return func() { unix.Prlimit(p.pid(), unix.RLIMIT_NOFILE, &before, nil) }
}

// ENABLE_ORIG_SRC=false: the application sees its own pod's address, and the log
// says so, once.
func TestSourceHidden(t *testing.T) {
	t.Parallel()
	n, srv := newNode(t, withEnv("ENABLE_ORIG_SRC=false")), pod(t, 3)
	n.add(t, srv, "--capture", "redirect")
	outside := bridge(t)
	for _, six := range []bool{false, true} {
		l := srv.listen(t, srv.ip(six), 0)
		for range 2 {
			c := outside.dial(t, l.addr)
			s := l.accept(t)
			if remote(s).Addr() != srv.ip(six) {
				t.Errorf("the application sees %v, want %v", remote(s).Addr(), srv.ip(six))
			}
			c.Close()
			hearsEnd(t, s)
		}
	}
	if got := strings.Count(n.zt.out.String(), "sees the pod's own address"); got != 1 {
		t.Errorf("it is said %d times, want once", got)
	}
}
