package mesh

import (
	"fmt"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"ambient-emulator/internal/worldtest"
)

// A gigabyte goes through a tunnel, three quarters of it there and the rest back at
// the same time.
func TestGigabyte(t *testing.T) {
	m := newMesh(t)
	client, server := m.pod(t, "client", local), m.pod(t, "server", remote)
	client.node.Program = worldtest.FastZtunnel
	server.node.Program = worldtest.FastZtunnel
	m.start(t)
	l := server.Listen(t, server.At(8080))
	const there, back = 3 << 28, 1 << 28
	c := client.Dial(t, server.At(8080))
	s := l.Accept(t)
	var passing sync.WaitGroup
	passing.Go(func() { worldtest.Pass(t, c, s, there, 1) })
	worldtest.Pass(t, s, c, back, 2)
	passing.Wait()
	out, in := direct(client, server)
	out.sent, out.recv, in.sent, in.recv = there, back, back, there
	client.node.says(t, out)
	server.node.says(t, in)
}

// Ten thousand connections, half of them at once and then the other half: each has a
// stream of its own, and a hundred of them a tunnel. A full tunnel is not used again
// and ends with its last stream.
func TestTenThousandStreams(t *testing.T) {
	m := newMesh(t)
	client, server := m.pod(t, "client", local), m.pod(t, "server", remote)
	client.node.Program = worldtest.FastZtunnel
	server.node.Program = worldtest.FastZtunnel
	m.start(t)
	echo := startEcho(t, server)
	tunnels := func() int { return client.sockets(t, "ESTAB", client.IP4.String()+`:\d+`, server.At(15008).String()) }
	const atOnce, each = 5000, 100
	for half := range 2 {
		conns := connectAll(t, client, server, atOnce)
		if n := tunnels(); n != atOnce/each {
			t.Errorf("for %d streams there are %d tunnels", atOnce, n)
		}
		// They are all alive.
		for i, fd := range conns {
			exchange(t, fd, fmt.Sprintf("%08d", i))
		}
		for _, fd := range conns {
			unix.Close(fd)
		}
		worldtest.WaitFor(t, "end of all tunnels", func() bool { return tunnels() == 0 })
		for _, n := range m.nodes {
			worldtest.WaitFor(t, "access lines", func() bool { return strings.Count(n.ZT.Log(), "\tconnection complete\t") == (half+1)*atOnce })
		}
	}
	for _, line := range append(lines(client.node.ZT), lines(server.node.ZT)...) {
		if !strings.HasPrefix(line, "info ") || !strings.Contains(line, " bytes_sent=16 bytes_recv=16 ") {
			t.Errorf("of one it says %s", line)
			break
		}
	}
	if n := echo.stop(t); n != 2*atOnce {
		t.Errorf("the server has seen %d connections", n)
	}
}

// connectAll makes so many connections, some at a time, and has an answer on each.
func connectAll(t *testing.T, from, to *pod, n int) []int {
	t.Helper()
	conns := make([]int, n)
	var wg sync.WaitGroup
	for worker := range 16 {
		wg.Go(func() {
			for i := worker; i < n; i += 16 {
				fd, err := from.Socket(to.At(8080))
				conns[i] = fd
				if err != nil {
					t.Errorf("connection %d: %v", i, err)
					return
				}
				exchange(t, fd, fmt.Sprintf("%08d", n-i))
			}
		})
	}
	wg.Wait()
	if t.Failed() {
		t.FailNow() // a word for each of the others says nothing more
	}
	return conns
}

// exchange says something, and wants it back.
func exchange(t *testing.T, fd int, text string) {
	t.Helper()
	got := make([]byte, len(text))
	if _, err := whole(func() (int, error) { return unix.Write(fd, []byte(text)) }); err != nil {
		t.Errorf("write: %v", err)
	} else if n, err := whole(func() (int, error) { return unix.Read(fd, got) }); err != nil || string(got[:n]) != text {
		t.Errorf("got %q, %v, want %q", got[:max(n, 0)], err, text)
	}
}

// whole calls again what a signal of the runtime has interrupted: with a timeout,
// the kernel does not (signal(7)).
func whole(call func() (int, error)) (n int, err error) {
	for err = unix.EINTR; err == unix.EINTR; {
		n, err = call()
	}
	return n, err
}

// echo is a server for many connections on one goroutine: the race detector knows
// 8,128 of these.
type echo struct {
	listener, poll int
	quit           [2]int // a pipe
	seen           int
	ended          chan struct{}
	once           sync.Once
}

func startEcho(t *testing.T, p *pod) *echo {
	t.Helper()
	l, err := p.Listen(t, p.At(8080)).File()
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	e := &echo{ended: make(chan struct{})}
	if e.listener, err = unix.FcntlInt(l.Fd(), unix.F_DUPFD_CLOEXEC, 0); err != nil {
		t.Fatal(err)
	}
	if e.poll, err = unix.EpollCreate1(unix.EPOLL_CLOEXEC); err != nil {
		t.Fatal(err)
	}
	if err := unix.Pipe2(e.quit[:], unix.O_CLOEXEC); err != nil {
		t.Fatal(err)
	}
	if err := unix.SetNonblock(e.listener, true); err != nil {
		t.Fatal(err)
	}
	e.watch(e.listener)
	e.watch(e.quit[0])
	go e.run()
	t.Cleanup(func() { e.stop(t) })
	return e
}

func (e *echo) watch(fd int) {
	unix.EpollCtl(e.poll, unix.EPOLL_CTL_ADD, fd, &unix.EpollEvent{Events: unix.EPOLLIN, Fd: int32(fd)})
}

func (e *echo) run() {
	defer close(e.ended)
	open := map[int]bool{}
	defer func() {
		for fd := range open {
			unix.Close(fd)
		}
	}()
	events, b := make([]unix.EpollEvent, 256), make([]byte, 64)
	for {
		n, err := unix.EpollWait(e.poll, events, -1)
		if err != nil && err != unix.EINTR {
			return
		}
		for _, event := range events[:max(n, 0)] {
			switch fd := int(event.Fd); fd {
			case e.quit[0]:
				return
			case e.listener:
				if c, _, err := unix.Accept4(fd, unix.SOCK_CLOEXEC); err == nil {
					e.seen++
					open[c] = true
					e.watch(c)
				}
			default:
				n, err := unix.Read(fd, b)
				if err == nil && n > 0 {
					_, err = unix.Write(fd, b[:n])
				}
				if err != nil || n == 0 {
					delete(open, fd)
					unix.Close(fd)
				}
			}
		}
	}
}

// stop ends the server, and returns how many connections it has had.
func (e *echo) stop(t *testing.T) int {
	t.Helper()
	e.once.Do(func() {
		unix.Write(e.quit[1], []byte{0})
		<-e.ended
		for _, fd := range []int{e.listener, e.poll, e.quit[0], e.quit[1]} {
			unix.Close(fd)
		}
	})
	return e.seen
}
