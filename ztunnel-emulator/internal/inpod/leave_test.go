package inpod

import (
	"log/slog"
	"testing"

	"golang.org/x/sys/unix"

	"ambient-emulator/internal/netns/netnstest"
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
			m, err := listen(ns, defaults.Addrs()[:1], defaults.factory(slog.Default()), nil)
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
