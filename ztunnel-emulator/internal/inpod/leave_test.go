package inpod

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ambient-emulator/internal/netns"
	"ambient-emulator/internal/netns/netnstest"
	"ambient-emulator/ztunnel-emulator/internal/proxy"
)

// Of the listeners of a group, the one that steps aside is not chosen any more,
// whatever its number; nor is it when only it is left to choose.
func TestStepAside(t *testing.T) {
	for _, tt := range []struct{ members, leaver, want int }{
		{2, 0, 0}, {2, 1, 0}, {3, 0, 0}, {3, 1, 0}, {3, 2, 0}, {1, 0, 100},
	} {
		ns := netnstest.New(t)
		var group []int
		for range tt.members {
			m, err := listen(ns.Do, defaults.Addrs()[:1], defaults.factory(slog.Default()), nil)
			if err != nil {
				t.Fatal(err)
			}
			group = append(group, m.sockets[0].fd)
		}
		kept := 0
		keep := func(conn int) { kept++; unix.Close(conn) }
		if others := stepAside(&pod{ns: ns}, group[tt.leaver], PortInbound, keep); others != (tt.members > 1) {
			t.Errorf("%d members: others %v", tt.members, others)
		}
		for range 100 {
			fd := clientIn(t, ns)
			if err := unix.Connect(fd, &unix.SockaddrInet4{Port: PortInbound, Addr: [4]byte{127, 0, 0, 1}}); err != nil {
				t.Fatal(err)
			}
		}
		acceptAll(group[tt.leaver], keep)
		if kept != tt.want {
			t.Errorf("%d members, number %d steps aside: it gets %d of 100 connections, want %d", tt.members, tt.leaver, kept, tt.want)
		}
		closeFDs(group)
	}
}

// How a leaver finds out whether it is alone is no news to the next one, or at most
// now and then: where that is quicker.
func TestLeaveLeavesNoLines(t *testing.T) {
	older, said := newMachine(t), &countingHandler{Handler: slog.NewTextHandler(io.Discard, nil)}
	config := *proxyDefaults
	config.Log = slog.New(said)
	w, err := NewWorkloads(defaults, &config, quiet)
	if err != nil {
		t.Fatal(err)
	}
	newer := machine{w, t}
	const many = 20
	for i := range many {
		ns, uid := netnstest.New(t), fmt.Sprint("u", i)
		older.must(older.add(uid, ns))
		newer.must(newer.add(uid, ns))
	}
	older.engine.drain(running(older), 5*time.Second)
	if err := w.Close(0); err != nil {
		t.Error(err)
	}
	if n := said.warnings.Load(); n > many/2 {
		t.Errorf("%d lines", n)
	}
}

// While one of two ztunnels leaves, both answer DNS, until the leaver's sockets are
// closed: then a query may be lost, of each client one.
func TestLeaveAnswersDNS(t *testing.T) {
	older, newer := newMachine(t), newMachine(t)
	ns := netnstest.New(t)
	older.must(older.snap(), older.add("u", ns))
	newer.must(newer.snap(), newer.add("u", ns))
	const many = 4
	var stop atomic.Bool
	var answered, lost atomic.Int64
	var clients sync.WaitGroup
	for range many {
		clients.Go(func() {
			for !stop.Load() {
				switch err := queryIn(ns); {
				case err == nil:
					answered.Add(1)
				case errors.Is(err, unix.EAGAIN), errors.Is(err, unix.ECONNREFUSED):
					lost.Add(1)
				default:
					t.Error(err)
					return
				}
			}
		})
	}
	waitFor(t, "some answers", func() bool { return answered.Load() > 100 })
	older.engine.drain(running(older), 5*time.Second)
	after := answered.Load()
	waitFor(t, "some more", func() bool { return answered.Load() > after+100 })
	stop.Store(true)
	clients.Wait()
	if lost.Load() > many {
		t.Errorf("%d answered, %d lost", answered.Load(), lost.Load())
	}
}

// queryIn asks a pod's 15053, from a new port, and waits a moment for the answer,
// which may be any.
func queryIn(ns *netns.NS) error {
	var fd int
	if _, err := ns.Do(func() (err error) {
		fd, err = unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		return err
	}); err != nil {
		return err
	}
	defer unix.Close(fd)
	moment := unix.NsecToTimeval((300 * time.Millisecond).Nanoseconds())
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &moment); err != nil {
		return err
	}
	if err := unix.Connect(fd, &unix.SockaddrInet4{Port: proxy.PortDNS, Addr: [4]byte{127, 0, 0, 1}}); err != nil {
		return err
	}
	// A query for the root's A (RFC 1035, 4.1).
	if _, err := unix.Write(fd, []byte{0, 1, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 1}); err != nil {
		return err
	}
	for {
		if _, err := unix.Read(fd, make([]byte, 512)); err != unix.EINTR {
			return err
		}
	}
}
