package capture

import (
	"fmt"
	"io"
	"net"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// A gibibyte arrives as it was sent.
func TestGigabyte(t *testing.T) {
	eachWay(t, func(t *testing.T, form string, six bool) {
		n, client, srv := newNode(t, fast), pod(t, 2), pod(t, 3)
		n.add(t, client, "--capture", form)
		n.add(t, srv, "--capture", form)
		l := srv.listen(t, srv.ip(six), 0)
		c := client.dial(t, l.addr)
		s := l.accept(t)
		for _, conn := range []net.Conn{c, s} {
			conn.SetDeadline(time.Now().Add(time.Minute))
		}
		sum := make(chan uint32, 1)
		go send(c, 1<<30, 1, sum)
		arrives(t, s, 1<<30, sum)
		s.Close()
		n.zt.line(t, `direction="outbound" bytes_sent=1073741824 bytes_recv=0`)
		n.zt.line(t, `direction="inbound" bytes_sent=0 bytes_recv=1073741824`)
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
func crowd(from *place, l server, n int) (clients, servers []*net.TCPConn, err error) {
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
		c, err := from.connect(l.addr)
		if err != nil {
			return err
		}
		c.SetDeadline(time.Now().Add(20 * time.Second))
		clients[i] = c
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
	a.add(t, client, "--capture", "redirect")
	b.add(t, srv, "--capture", "redirect")
	l := srv.listen(t, srv.ip4, 0)
	talk(t, client, l)
	a.zt.line(t, "outbound")
	b.zt.line(t, "inbound")
	beforeA, beforeB := len(a.zt.descriptors(t, "")), len(b.zt.descriptors(t, ""))

	clients, servers, err := crowd(client, l, many)
	defer closeAll(clients)
	defer closeAll(servers)
	if err != nil {
		t.Fatal(err)
	}
	if got := len(a.zt.descriptors(t, "")) - beforeA; got != 2*many {
		t.Errorf("the client's ztunnel has %d descriptors for %d connections", got, many)
	}
	if got := len(b.zt.descriptors(t, "")) - beforeB; got != 2*many {
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
	waitFor(t, "end of all connections", func() bool {
		return len(a.zt.descriptors(t, "socket:")) < beforeA && len(b.zt.descriptors(t, "socket:")) < beforeB
	})
}
