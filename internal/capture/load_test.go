package capture

import (
	"fmt"
	"io"
	"net"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ambient-emulator/internal/worldtest"
)

// A gibibyte arrives as it was sent.
func TestGigabyte(t *testing.T) {
	eachWay(t, func(t *testing.T, form string, six bool) {
		n, client, srv := newNode(t, fast), pod(t, 2), pod(t, 3)
		n.Add(t, client, "--capture", form)
		n.Add(t, srv, "--capture", form)
		l := srv.Listen(t, at(srv, six, 0))
		c := client.Dial(t, l.At)
		s := l.Accept(t)
		worldtest.Pass(t, c, s, 1<<30, 1)
		s.Close()
		n.ZT.Line(t, `direction="outbound" bytes_sent=1073741824 bytes_recv=0`)
		n.ZT.Line(t, `direction="inbound" bytes_sent=0 bytes_recv=1073741824`)
	})
}

// each runs f with 0 to n-1, some at once.
func each(n int, f func(i int) error) error {
	next, errs := make(chan int), make(chan error, 32)
	for range cap(errs) {
		go func() {
			var first error
			for i := range next {
				if err := f(i); err != nil && first == nil {
					first = fmt.Errorf("%d: %w", i, err)
				}
			}
			errs <- first
		}()
	}
	for i := range n {
		next <- i
	}
	close(next)
	var first error
	for range cap(errs) {
		if err := <-errs; err != nil {
			first = err
		}
	}
	return first
}

// crowd makes n connections, both of whose ends the caller closes, and pairs them:
// each client says its number.
func crowd(from *worldtest.Place, l worldtest.Server, n int) (clients, servers []*net.TCPConn, err error) {
	clients, servers = make([]*net.TCPConn, n), make([]*net.TCPConn, n)
	accepted := make(chan error, 1)
	l.SetDeadline(time.Now().Add(20 * time.Second))
	go func() {
		accepted <- each(n, func(int) error {
			c, err := l.AcceptTCP()
			if err != nil {
				return err
			}
			c.SetDeadline(time.Now().Add(20 * time.Second))
			var i int
			if _, err := fmt.Fscanf(c, "%06d\n", &i); err != nil {
				return err
			}
			servers[i] = c
			return nil
		})
	}()
	err = each(n, func(i int) error {
		c, err := from.Connect(l.At)
		if err != nil {
			return err
		}
		c.SetDeadline(time.Now().Add(20 * time.Second))
		clients[i] = c.TCPConn
		_, err = fmt.Fprintf(c, "%06d\n", i)
		return err
	})
	if aerr := <-accepted; err == nil {
		err = aerr
	}
	return clients, servers, err
}

func closeAll(conns []*net.TCPConn) {
	for _, c := range conns {
		if c != nil {
			c.Close()
		}
	}
}

// Five thousand connections at the same time, between pods of two nodes: none is
// lost or mixed up with another, and each costs a ztunnel two descriptors.
func TestFiveThousand(t *testing.T) {
	t.Parallel()
	const many = 5000
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil || limit.Max < 2*many+500 {
		t.Fatalf("too few descriptors for this test: %d (%v); raise ulimit -Hn", limit.Max, err)
	}
	a, b, client, srv := newNode(t, fast), newNode(t, fast), pod(t, 2), pod(t, 3)
	a.Add(t, client, "--capture", "redirect")
	b.Add(t, srv, "--capture", "redirect")
	l := srv.Listen(t, srv.At(0))
	talk(t, client, l)
	a.ZT.Line(t, "outbound")
	b.ZT.Line(t, "inbound")
	beforeA, beforeB := len(a.ZT.Descriptors(t, "")), len(b.ZT.Descriptors(t, ""))

	clients, servers, err := crowd(client, l, many)
	defer closeAll(clients)
	defer closeAll(servers)
	if err != nil {
		t.Fatal(err)
	}
	if got := len(a.ZT.Descriptors(t, "")) - beforeA; got != 2*many {
		t.Errorf("the client's ztunnel has %d descriptors for %d connections", got, many)
	}
	if got := len(b.ZT.Descriptors(t, "")) - beforeB; got != 2*many {
		t.Errorf("the server's ztunnel has %d descriptors for %d connections", got, many)
	}
	// Each server tells its client the number.
	if err := each(many, func(i int) error {
		_, err := fmt.Fprintf(servers[i], "%06d\n", i)
		servers[i].CloseWrite()
		return err
	}); err != nil {
		t.Error(err)
	}
	if err := each(many, func(i int) error {
		got, err := io.ReadAll(clients[i])
		if want := fmt.Sprintf("%06d\n", i); err != nil || string(got) != want {
			return fmt.Errorf("read %q, %v", got, err)
		}
		return clients[i].Close()
	}); err != nil {
		t.Error(err)
	}
	worldtest.WaitFor(t, "end of all connections", func() bool {
		return len(a.ZT.Descriptors(t, "socket:")) < beforeA && len(b.ZT.Descriptors(t, "socket:")) < beforeB
	})
}
