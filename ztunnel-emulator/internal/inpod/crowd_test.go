package inpod

import (
	"errors"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ambient-emulator/internal/handoff"
	"ambient-emulator/internal/netns"
	"ambient-emulator/internal/netns/netnstest"
	"ambient-emulator/internal/testmain"
)

// More silent peers than there are places hold up nobody: a good handoff is
// served while they all still sit there, and those who had to go are told why.
func TestFloodOfSilentPeers(t *testing.T) {
	z := start(t)
	var silent []*net.UnixConn
	for range 2 * MaxPeers {
		silent = append(silent, z.dial())
	}
	for range 3 {
		pod := netnstest.New(t)
		if err := z.hand(pod.FD()); err != nil {
			t.Fatal(err)
		}
		checkServed(t, pod)
	}
	var refused *handoff.RefusedError
	if err := handoff.ReadReply(silent[0]); !errors.As(err, &refused) || refused.Reason != ErrCrowded.Error() {
		t.Errorf("the first silent peer is told %v", err)
	}
}

// Alone, a silent peer has five seconds, and is told when they are over.
func TestSilentPeer(t *testing.T) {
	t.Parallel()
	z := start(t)
	conn := z.dial()
	var refused *handoff.RefusedError
	if err := handoff.ReadReply(conn); !errors.As(err, &refused) || refused.Reason != "no message within 5s" {
		t.Errorf("got %v", err)
	}
}

// Silent peers do not delay the end either.
func TestStopWithSilentPeers(t *testing.T) {
	z := start(t)
	silent := z.dial()
	if err := z.hand(netnstest.New(t).FD()); err != nil {
		t.Fatal(err)
	}
	z.stop()
	var refused *handoff.RefusedError
	if err := handoff.ReadReply(silent); !errors.As(err, &refused) || refused.Reason != ErrStopping.Error() {
		t.Errorf("got %v", err)
	}
}

func TestAddAfterClose(t *testing.T) {
	z := start(t)
	z.stop()
	if _, err := z.pods.Add(netnstest.Dup(t, netnstest.New(t))); !errors.Is(err, ErrStopping) {
		t.Errorf("got %v", err)
	}
}

// With our own descriptor table full, a peer is still told so, and what is there
// goes on as soon as there is room again.
func TestTableFull(t *testing.T) {
	z := start(t)
	served, next := netnstest.New(t), netnstest.New(t)
	if err := z.hand(served.FD()); err != nil {
		t.Fatal(err)
	}
	z.report(0)
	client := clientIn(t, served)
	peer, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	peerFile := os.NewFile(uintptr(peer), "peer")
	defer peerFile.Close()

	release := fillTable(t, 0)
	defer release()
	// A handoff: refused by name.
	if err := unix.Connect(peer, &unix.SockaddrUnix{Name: z.path}); err != nil {
		t.Fatal(err)
	}
	// EPIPE if the refusal was faster; it can be read all the same.
	if _, err := unix.SendmsgN(peer, []byte{handoff.Add}, unix.UnixRights(next.FD()), nil, unix.MSG_NOSIGNAL); err != nil && !errors.Is(err, unix.EPIPE) {
		t.Fatal(err)
	}
	answer := make([]byte, 512)
	n, err := unix.Read(peer, answer)
	if err != nil || !strings.Contains(string(answer[:n]), "\x01the receiver's descriptor table is full") {
		t.Errorf("the peer is told %q (%v)", answer[:n], err)
	}
	// A connection in the pod: the kernel has taken it, and it waits.
	if err := unix.Connect(client, &unix.SockaddrInet4{Port: PortInbound, Addr: [4]byte{127, 0, 0, 1}}); err != nil {
		t.Fatal(err)
	}
	release()
	if n, err := unix.Read(client, answer); string(answer[:n]) != Answer {
		t.Errorf("the waiting client reads %q (%v)", answer[:n], err)
	}
	if err := z.hand(next.FD()); err != nil {
		t.Errorf("the next handoff: %v", err)
	}
	checkServed(t, next)
}

// clientIn makes an unconnected, blocking TCP socket in a pod.
func clientIn(t *testing.T, pod *netns.NS) (fd int) {
	t.Helper()
	if _, err := pod.Do(func() (err error) {
		fd, err = unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		return err
	}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	return fd
}

// fillTable leaves the process so many free descriptors until release is called.
func fillTable(t *testing.T, free int) (release func()) {
	t.Helper()
	var old unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &old); err != nil {
		t.Fatal(err)
	}
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 300, Max: old.Max}); err != nil {
		t.Fatal(err)
	}
	var fill []int
	for {
		fd, err := unix.Open(os.DevNull, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			break
		}
		fill = append(fill, fd)
	}
	closeFDs(fill[len(fill)-free:])
	fill = fill[:len(fill)-free]
	return sync.OnceFunc(func() {
		unix.Setrlimit(unix.RLIMIT_NOFILE, &old)
		closeFDs(fill)
	})
}

// A table that fills up half way through a pod's start: all or nothing.
func TestTableFullInsideThePod(t *testing.T) {
	z := start(t)
	pod := netnstest.New(t)
	conn := z.dial()
	waitFor(t, "accept", func() bool {
		z.server.peers.mu.Lock()
		defer z.server.peers.mu.Unlock()
		return len(z.server.peers.silent) == 1
	})
	before := testmain.Descriptors()
	release := fillTable(t, 3) // the namespace and two of three listeners
	defer release()
	err := handoff.Send(conn, pod.FD())
	if err == nil {
		err = handoff.ReadReply(conn)
	}
	release()
	var refused *handoff.RefusedError
	if !errors.As(err, &refused) || !strings.Contains(refused.Reason, "listen on 127.0.0.1:15001: socket: too many open files") || !strings.Contains(refused.Reason, "ulimit") {
		t.Errorf("got %v", err)
	}
	z.report(0)
	if after := testmain.Descriptors(); len(after) != len(before)-1 { // the connection is gone
		t.Errorf("descriptors before: %q\nafter: %q", before, after)
	}
	if err := z.hand(pod.FD()); err != nil {
		t.Errorf("with room again: %v", err)
	}
	checkServed(t, pod)
}

// Clients that speak first, say much, or never hang up get the answer and cost
// nothing in the end.
func TestAwkwardClients(t *testing.T) {
	z := start(t)
	pod := netnstest.New(t)
	if err := z.hand(pod.FD()); err != nil {
		t.Fatal(err)
	}
	z.report(0)
	before := len(testmain.Descriptors())

	for name, words := range map[string]string{
		"speaks first": "GET / HTTP/1.1\r\n\r\n",
		"says much":    strings.Repeat("x", 2*lingerBytes),
		"stays":        "",
	} {
		fd := clientIn(t, pod)
		if err := unix.Connect(fd, &unix.SockaddrInet4{Port: PortOutbound, Addr: [4]byte{127, 0, 0, 1}}); err != nil {
			t.Fatal(err)
		}
		unix.Write(fd, []byte(words))
		answer := make([]byte, 16)
		n, err := unix.Read(fd, answer)
		if string(answer[:max(n, 0)]) != Answer {
			t.Errorf("%s: reads %q (%v)", name, answer[:max(n, 0)], err)
		}
	}
	// Our own three ends are open until the test's end; the server's are not.
	waitFor(t, "end of the server's ends", func() bool { return len(testmain.Descriptors()) == before+3 })
}

// More connections than the server waits for at once: everyone is answered.
func TestManyClients(t *testing.T) {
	z := start(t)
	pod := netnstest.New(t)
	if err := z.hand(pod.FD()); err != nil {
		t.Fatal(err)
	}
	const n = 2 * lingerMost
	conns := make([]net.Conn, 0, n)
	if _, err := pod.Do(func() error {
		for range n {
			c, err := net.Dial("tcp", "127.0.0.1:15008")
			if err != nil {
				return err
			}
			conns = append(conns, c)
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	for _, c := range conns {
		c.SetDeadline(time.Now().Add(10 * time.Second))
		if b, err := io.ReadAll(c); string(b) != Answer || err != nil {
			t.Fatalf("%q, %v", b, err)
		}
	}
	for _, c := range conns {
		c.Close()
	}
}

// The end does not wait for clients.
func TestStopWithClients(t *testing.T) {
	z := start(t)
	pod := netnstest.New(t)
	if err := z.hand(pod.FD()); err != nil {
		t.Fatal(err)
	}
	fd := clientIn(t, pod)
	if err := unix.Connect(fd, &unix.SockaddrInet4{Port: PortInbound, Addr: [4]byte{127, 0, 0, 1}}); err != nil {
		t.Fatal(err)
	}
	unix.Read(fd, make([]byte, 16))
	z.stop() // TestMain counts descriptors
}

func closeFDs(fds []int) {
	for _, fd := range fds {
		unix.Close(fd)
	}
}
