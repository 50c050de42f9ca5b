package main

import (
	"context"
	"errors"
	"io"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"ambient-emulator/internal/netns"
)

// clients open connections in every pod, one after the other, until stopped.
type clients struct {
	served                 atomic.Int64
	refused, reset, others atomic.Int64

	perPod []atomic.Int64
	ending atomic.Bool
	wg     sync.WaitGroup

	mu    sync.Mutex
	times []time.Duration
}

func startClients(pods []*netns.NS) *clients {
	c := &clients{perPod: make([]atomic.Int64, len(pods))}
	for i, pod := range pods {
		c.wg.Go(func() { c.client(i, pod) })
	}
	return c
}

// client is the one of a pod. It pauses between connections, so that a hundred
// of them leave the machine some time for everybody else.
func (c *clients) client(i int, pod *netns.NS) {
	for port := 0; !c.ending.Load(); port++ {
		began := time.Now()
		err := connect(pod, []string{"15008", "15006", "15001"}[port%3])
		switch {
		case err == nil:
			c.served.Add(1)
			c.perPod[i].Add(1)
			c.mu.Lock()
			c.times = append(c.times, time.Since(began))
			c.mu.Unlock()
		case errors.Is(err, unix.ECONNREFUSED):
			c.refused.Add(1)
		case errors.Is(err, unix.ECONNRESET):
			c.reset.Add(1)
		default:
			c.others.Add(1)
		}
		time.Sleep(2 * time.Millisecond)
	}
}

// connect opens a connection inside the pod and wants what ztunnel has for one that
// nobody has redirected: a word on 15008, and a clean end on the others. One that is
// lost is reset.
func connect(pod *netns.NS, port string) error {
	var conn net.Conn
	if _, err := pod.Do(func() (err error) {
		conn, err = net.Dial("tcp", "127.0.0.1:"+port)
		return err
	}); err != nil {
		return err
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(5 * time.Second))
	b, err := io.ReadAll(conn)
	want := ""
	if port == "15008" {
		want = "ok\n"
	}
	if err == nil && string(b) != want {
		err = io.ErrUnexpectedEOF
	}
	return err
}

// waitFor waits until the client of every pod has been served n times more.
func (c *clients) waitFor(ctx context.Context, n int64) error {
	want := make([]int64, len(c.perPod))
	for i := range want {
		want[i] = c.perPod[i].Load() + n
	}
	return waitUntil(ctx, "connections in every pod", func() bool {
		for i := range want {
			if c.perPod[i].Load() < want[i] {
				return false
			}
		}
		return true
	})
}

func (c *clients) stop() {
	c.ending.Store(true)
	c.wg.Wait()
}

// report fills in what was seen. The clients have been stopped.
func (c *clients) report(r *report) {
	r.served = c.served.Load()
	r.refused, r.reset, r.other = c.refused.Load(), c.reset.Load(), c.others.Load()
	slices.Sort(c.times)
	if n := len(c.times); n > 0 {
		r.median, r.slowest = c.times[n/2], c.times[n-1]
	}
}
