package proxy

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"runtime"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ambient-emulator/internal/testmain"
)

func init() { runtime.LockOSThread() }

func TestMain(m *testing.M) { testmain.Run(m) }

// relayed is a client and a server with a relay between them, and what that
// reports once it has ended.
type relayed struct {
	client, server *net.TCPConn
	done           chan result
}

type result struct {
	Counts
	err error
}

func startRelay(t *testing.T) *relayed {
	t.Helper()
	client, a := tcpPair(t)
	server, b := tcpPair(t)
	r := &relayed{client: client, server: server, done: make(chan result, 1)}
	Relay(a, b, func(c Counts, err error) {
		closeAfter(a, err)
		closeAfter(b, err)
		r.done <- result{c, err}
	})
	t.Cleanup(closePipes)
	return r
}

// tcpPair is a connection over loopback: one end for the test, one for the relay.
func tcpPair(t testing.TB) (*net.TCPConn, Conn) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	ours, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	theirs, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	ours.SetDeadline(time.Now().Add(30 * time.Second))
	t.Cleanup(func() { ours.Close() })
	return ours.(*net.TCPConn), NewConn(detach(t, theirs))
}

// detach takes the descriptor of a connection, as accept4(2) would have given it.
func detach(t testing.TB, c net.Conn) int {
	t.Helper()
	defer c.Close()
	f, err := c.(*net.TCPConn).File()
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.SetNonblock(fd, true); err != nil {
		t.Fatal(err)
	}
	return fd
}

// wait returns what became of the relay.
func (r *relayed) wait(t *testing.T) result {
	t.Helper()
	select {
	case res := <-r.done:
		return res
	case <-time.After(30 * time.Second):
		t.Fatal("the relay has not ended")
		return result{}
	}
}

func TestShortExchange(t *testing.T) {
	r := startRelay(t)
	fmt.Fprint(r.client, "hello world")
	buf := make([]byte, 64)
	n, err := r.server.Read(buf)
	if string(buf[:n]) != "hello world" || err != nil {
		t.Errorf("the server reads %q, %v", buf[:n], err)
	}
	fmt.Fprint(r.server, "and a good day to you, too")
	n, err = r.client.Read(buf)
	if string(buf[:n]) != "and a good day to you, too" || err != nil {
		t.Errorf("the client reads %q, %v", buf[:n], err)
	}
	r.client.Close()
	r.server.Close()
	if res := r.wait(t); res.Counts != (Counts{11, 26}) || res.err != nil {
		t.Errorf("%+v", res)
	}
}

// An end of one direction is passed on and leaves the other one open, whichever
// comes first.
func TestHalfClose(t *testing.T) {
	for _, clientFirst := range []bool{true, false} {
		r := startRelay(t)
		first, second := r.client, r.server
		if !clientFirst {
			first, second = second, first
		}
		fmt.Fprint(first, "last words")
		first.CloseWrite()
		got, err := io.ReadAll(second)
		if string(got) != "last words" || err != nil {
			t.Errorf("client first %v: %q, %v", clientFirst, got, err)
		}
		fmt.Fprint(second, "and still an answer")
		second.CloseWrite()
		got, err = io.ReadAll(first)
		if string(got) != "and still an answer" || err != nil {
			t.Errorf("client first %v: back %q, %v", clientFirst, got, err)
		}
		if res := r.wait(t); res.err != nil {
			t.Errorf("client first %v: %v", clientFirst, res.err)
		}
	}
}

// Much goes both ways at once, and arrives as it was.
func TestMuchBothWays(t *testing.T) {
	const size = 64<<20 + 12345 // beyond plain reads, and no round number
	r := startRelay(t)
	var wg sync.WaitGroup
	send := func(to *net.TCPConn, seed uint64, sum *[32]byte) {
		defer wg.Done()
		h := sha256.New()
		if _, err := io.Copy(io.MultiWriter(to, h), io.LimitReader(rand.NewChaCha8([32]byte{byte(seed)}), size)); err != nil {
			t.Errorf("send: %v", err)
		}
		to.CloseWrite()
		*sum = [32]byte(h.Sum(nil))
	}
	receive := func(from *net.TCPConn, sum *[32]byte) {
		defer wg.Done()
		h := sha256.New()
		if n, err := io.Copy(h, from); n != size || err != nil {
			t.Errorf("received %d bytes, %v", n, err)
		}
		*sum = [32]byte(h.Sum(nil))
	}
	var sent, got [2][32]byte
	wg.Add(4)
	go send(r.client, 1, &sent[0])
	go send(r.server, 2, &sent[1])
	go receive(r.server, &got[0])
	go receive(r.client, &got[1])
	wg.Wait()
	if sent != got {
		t.Error("what arrived is not what was sent")
	}
	if res := r.wait(t); res.Counts != (Counts{size, size}) || res.err != nil {
		t.Errorf("%+v", res)
	}
}

// A reset of one end ends the other, and says so.
func TestReset(t *testing.T) {
	for _, after := range []int{0, 2 * spliceAfter} {
		r := startRelay(t)
		go r.client.Write(bytes.Repeat([]byte{'x'}, after+1))
		if _, err := io.ReadFull(r.server, make([]byte, after+1)); err != nil {
			t.Fatal(err)
		}
		r.server.SetLinger(0)
		r.server.Close()
		res := r.wait(t)
		var ce *CopyError
		if !errors.As(res.err, &ce) || !errors.Is(res.err, unix.ECONNRESET) {
			t.Errorf("after %d bytes: %v", after, res.err)
		}
		if _, err := r.client.Read(make([]byte, 1)); err == nil {
			t.Errorf("after %d bytes: the client goes on", after)
		}
	}
}

// An idle relay holds its two sockets: no pipe, although it has spliced.
func TestIdleHoldsNoPipe(t *testing.T) {
	before := len(testmain.Descriptors())
	r := startRelay(t)
	go r.client.Write(make([]byte, 4*spliceAfter))
	if _, err := io.ReadFull(r.server, make([]byte, 4*spliceAfter)); err != nil {
		t.Fatal(err)
	}
	waitFor(t, "an idle relay", func() bool {
		closePipes()                                   // those that nobody holds
		return len(testmain.Descriptors()) == before+4 // our two ends, and the relay's
	})
	// And it still works.
	fmt.Fprint(r.client, "on")
	if _, err := io.ReadFull(r.server, make([]byte, 2)); err != nil {
		t.Fatal(err)
	}
	r.client.Close()
	r.server.Close()
	r.wait(t)
}

// A reader that stops stops the writer, and nothing is lost when it goes on.
func TestSlowReader(t *testing.T) {
	const size = 32 << 20
	r := startRelay(t)
	go func() {
		r.client.Write(make([]byte, size))
		r.client.CloseWrite()
	}()
	time.Sleep(50 * time.Millisecond)
	n, err := io.Copy(io.Discard, r.server)
	if n != size || err != nil {
		t.Errorf("%d bytes, %v", n, err)
	}
	r.server.Close()
	r.wait(t)
}

// With no descriptor left for a pipe, bytes go through user space.
func TestNoDescriptorForAPipe(t *testing.T) {
	r := startRelay(t)
	var old unix.Rlimit
	unix.Getrlimit(unix.RLIMIT_NOFILE, &old)
	closePipes()
	unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 0, Max: old.Max})
	defer unix.Setrlimit(unix.RLIMIT_NOFILE, &old)
	const size = 8 * spliceAfter
	go func() {
		r.client.Write(make([]byte, size))
		r.client.CloseWrite()
	}()
	if n, err := io.Copy(io.Discard, r.server); n != size || err != nil {
		t.Errorf("%d bytes, %v", n, err)
	}
	r.server.Close()
	if res := r.wait(t); res.err != nil || res.Sent != size {
		t.Errorf("%+v", res)
	}
}

// Without rules a connection was going where it went.
func TestOriginalDstWithoutRules(t *testing.T) {
	for _, network := range []string{"127.0.0.1:0", "[::1]:0", "[::]:0"} {
		l, err := net.Listen("tcp", network)
		if err != nil {
			t.Fatal(err)
		}
		port := l.Addr().(*net.TCPAddr).Port
		host := map[string]string{"127.0.0.1:0": "127.0.0.1", "[::1]:0": "::1", "[::]:0": "127.0.0.1"}[network]
		c, err := net.Dial("tcp", net.JoinHostPort(host, fmt.Sprint(port)))
		if err != nil {
			t.Fatal(err)
		}
		conn, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		f, err := conn.(*net.TCPConn).File()
		if err != nil {
			t.Fatal(err)
		}
		addr, redirected, err := OriginalDst(int(f.Fd()))
		if want := net.JoinHostPort(host, fmt.Sprint(port)); addr.String() != want || redirected || err != nil {
			t.Errorf("%s: %v, redirected %v, %v; want %s", network, addr, redirected, err, want)
		}
		for _, x := range []io.Closer{f, conn, c, l} {
			x.Close()
		}
	}
}

func waitFor(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("no %s within 10 s", what)
		}
	}
}

// closePipes empties the pool, for tests that count.
func closePipes() {
	pipes.Lock()
	defer pipes.Unlock()
	for _, p := range pipes.free {
		p.close()
	}
	pipes.free = nil
}

// A server that resets while the client writes: whichever of the relay's two
// directions the kernel tells, the client must not take it for an end. It, too, is
// told only once.
func TestResetIsNeverAnEnd(t *testing.T) {
	for i := range 300 {
		r := startRelay(t)
		wrote := make(chan error, 1)
		go func() {
			var err error
			for range 20 {
				if _, err = r.client.Write(make([]byte, 100)); err != nil {
					break
				}
			}
			wrote <- err
		}()
		if _, err := io.ReadFull(r.server, make([]byte, 1+i%200)); err != nil {
			t.Fatal(err)
		}
		r.server.SetLinger(0)
		r.server.Close()
		writeErr := <-wrote
		if _, err := r.client.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) && !errors.Is(writeErr, unix.ECONNRESET) {
			t.Fatalf("round %d: the client has written with %v and reads %v, want a reset", i, writeErr, err)
		}
		r.wait(t)
	}
}

// Both ends end at the same moment: each gets the other's FIN, and no reset.
func TestBothEndAtOnce(t *testing.T) {
	for i := range 1000 {
		r := startRelay(t)
		read := make(chan error, 1)
		end := func(c *net.TCPConn) error {
			c.CloseWrite()
			_, err := io.ReadAll(c)
			c.Close()
			return err
		}
		go func() { read <- end(r.client) }()
		serverErr, clientErr := end(r.server), <-read
		if res := r.wait(t); res.err != nil || serverErr != nil || clientErr != nil {
			t.Fatalf("round %d: %v; the client reads %v, the server %v", i, res.err, clientErr, serverErr)
		}
	}
}

// An echo that nobody reads any more writes before it reads what is left. It is told
// that its client has gone.
func TestResetOfWhoDoesNotRead(t *testing.T) {
	defer func(before time.Duration) { lastWords = before }(lastWords)
	lastWords = 100 * time.Millisecond
	r := startRelay(t)
	go io.Copy(struct{ io.Writer }{r.server}, struct{ io.Reader }{r.server})
	r.client.SetWriteDeadline(time.Now().Add(time.Second))
	if _, err := r.client.Write(make([]byte, 1<<30)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatalf("all is full: %v", err)
	}
	r.client.SetLinger(0)
	r.client.Close()
	select {
	case res := <-r.done:
		if !errors.Is(res.err, unix.ECONNRESET) && !errors.Is(res.err, unix.EPIPE) {
			t.Errorf("%v", res.err)
		}
	case <-time.After(10 * time.Second):
		r.server.Close()
		t.Error("the client is gone, and the relay goes on for ever")
		r.wait(t)
	}
}

// What broke a relay is told in the words of the real one's log, as what kept it from
// beginning.
func TestCopyErrorWords(t *testing.T) {
	for _, err := range []error{unix.ETIMEDOUT, os.NewSyscallError("write", unix.ETIMEDOUT)} {
		if got, want := (&CopyError{Op: "receive", Err: err}).Error(), "receive: Connection timed out (os error 110)"; got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
}
