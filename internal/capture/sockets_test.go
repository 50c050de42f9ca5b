package capture

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"ambient-emulator/internal/worldtest"
)

// socketOf returns a descriptor of our own of the process's socket that has this
// peer (pidfd_getfd(2)).
func socketOf(t *testing.T, p *worldtest.Process, peer netip.AddrPort) int {
	t.Helper()
	pidfd, err := unix.PidfdOpen(p.Pid, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(pidfd)
	for _, fd := range p.Descriptors(t, "socket:") {
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
	t.Fatalf("%s has no connection to %v", p.Name, peer)
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
		c.Say(t, "hello")
		s.Hears(t, "hello")
		between := local(c) // who calls the server's side
		if p.clientNode != nil {
			checkOptions(t, "outbound, accepted", socketOf(t, p.clientNode.ZT, local(c)), usual)
			onward := socketOf(t, p.clientNode.ZT, remote(c))
			checkOptions(t, "outbound, onward", onward, usual)
			sa, err := unix.Getsockname(onward)
			if err != nil {
				t.Fatal(err)
			}
			between = addrPort(sa)
		}
		if p.serverNode != nil {
			checkOptions(t, "inbound, accepted", socketOf(t, p.serverNode.ZT, between), usual)
			checkOptions(t, "inbound, onward", socketOf(t, p.serverNode.ZT, local(s)), usual)
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
		n.Add(t, client, "--capture", "redirect")
		l := srv.Listen(t, srv.At(0))
		c := client.Dial(t, l.At)
		l.Accept(t)
		checkOptions(t, fmt.Sprint("accepted ", tt.env), socketOf(t, n.ZT, local(c)), tt.want)
		checkOptions(t, fmt.Sprint("onward ", tt.env), socketOf(t, n.ZT, l.At), tt.want)
	}
}

// An idle connection costs ztunnel two descriptors, also when it has been busy.
func TestIdleConnection(t *testing.T) {
	t.Parallel()
	n, client, srv := newNode(t), pod(t, 2), pod(t, 3)
	n.Add(t, client, "--capture", "redirect")
	l := srv.Listen(t, srv.At(0))
	talk(t, client, l)
	n.ZT.Line(t, "outbound")
	sockets, all := len(n.ZT.Descriptors(t, "socket:")), len(n.ZT.Descriptors(t, ""))
	const many = 100
	var clients, servers []*worldtest.Conn
	for range many {
		clients = append(clients, client.Dial(t, l.At))
		servers = append(servers, l.Accept(t))
	}
	for i := range many {
		clients[i].Say(t, "x")
		servers[i].Hears(t, "x")
	}
	if got := len(n.ZT.Descriptors(t, "")); got != all+2*many {
		t.Errorf("%d connections cost %d descriptors", many, got-all)
	}
	// Beyond 128 KiB there are pipes, for as long as there is something in them.
	for i := range many {
		much := strings.Repeat("x", 300<<10)
		go clients[i].Write([]byte(much))
		servers[i].Hears(t, much)
	}
	worldtest.WaitFor(t, "two descriptors a connection, and a few pipes", func() bool {
		return len(n.ZT.Descriptors(t, "socket:")) == sockets+2*many && len(n.ZT.Descriptors(t, "pipe:")) < 20
	})
}

// ztunnel's own table is full: a connection that gets no way onward is reset, and
// told why in the log; then all goes on.
func TestTableFull(t *testing.T) {
	t.Parallel()
	n, client, srv := newNode(t), pod(t, 2), pod(t, 3)
	n.Add(t, client, "--capture", "redirect")
	l := srv.Listen(t, srv.At(0))
	talk(t, client, l)
	n.ZT.Line(t, "outbound")

	// Room for two connections and the beginning of a third.
	release := limit(t, n.ZT, 5)
	first := client.Dial(t, l.At)
	firstServer := l.Accept(t)
	second := client.Dial(t, l.At)
	secondServer := l.Accept(t)
	third := client.Dial(t, l.At)
	third.HearsReset(t)
	if got, want := n.ZT.Line(t, fmt.Sprintf("src.addr=%v ", local(third))), `error="io error: Too many open files (os error 24)"`; !strings.HasSuffix(got, want) {
		t.Errorf("the access line is %s", got)
	}
	third.Close()
	first.Say(t, "still here")
	firstServer.Hears(t, "still here")
	secondServer.Say(t, "I too")
	second.Hears(t, "I too")

	release()
	talk(t, client, l)
}

// limit leaves the process so many free descriptors until release is called.
func limit(t *testing.T, p *worldtest.Process, free int) (release func()) {
	t.Helper()
	used := p.Descriptors(t, "")
	most := 0
	for ; free > 0 || slices.Contains(used, most); most++ {
		if !slices.Contains(used, most) {
			free--
		}
	}
	var before unix.Rlimit
	if err := unix.Prlimit(p.Pid, unix.RLIMIT_NOFILE, nil, &before); err != nil {
		t.Fatal(err)
	}
	if err := unix.Prlimit(p.Pid, unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: uint64(most), Max: before.Max}, nil); err != nil {
		t.Fatal(err)
	}
	return func() { unix.Prlimit(p.Pid, unix.RLIMIT_NOFILE, &before, nil) }
}

// ENABLE_ORIG_SRC=false: the application sees its own pod's address, and the log
// says so, once.
func TestSourceHidden(t *testing.T) {
	t.Parallel()
	n, srv := newNode(t, withEnv("ENABLE_ORIG_SRC=false")), pod(t, 3)
	n.Add(t, srv, "--capture", "redirect")
	outside := world(t).Open(t, "bridge")
	for _, six := range []bool{false, true} {
		l := srv.Listen(t, at(srv, six, 0))
		for range 2 {
			c := outside.Dial(t, l.At)
			s := l.Accept(t)
			if remote(s).Addr() != srv.IP(six) {
				t.Errorf("the application sees %v, want %v", remote(s).Addr(), srv.IP(six))
			}
			c.Close()
			s.HearsEnd(t)
		}
	}
	if got := strings.Count(n.ZT.Log(), "sees the pod's own address"); got != 1 {
		t.Errorf("it is said %d times, want once", got)
	}
}
