package inpod

import (
	"errors"
	"testing"

	"golang.org/x/sys/unix"

	"ambient-emulator/internal/netns"
	"ambient-emulator/ztunnel-emulator/internal/proxy"
)

// A dedicated ztunnel serves where it is, with plain sockets, until Close.
func TestDedicated(t *testing.T) {
	home, err := netns.Home()
	if err != nil {
		t.Fatal(err)
	}
	config := SocketConfig{IPv6: true, Mark: DefaultMark, PortReuse: true, DNS: true}
	id := proxy.Identity{Namespace: "default", Name: "local", ServiceAccount: "sa"}
	d, err := NewDedicated(config, proxyDefaults, id, quiet)
	if err != nil {
		t.Fatal(err)
	}
	if !listening(home) {
		t.Error("nobody listens here")
	}
	for _, s := range d.pod.sockets {
		for name, want := range map[string][2]int{
			"SO_MARK":      {unix.SO_MARK, 0},
			"SO_REUSEPORT": {unix.SO_REUSEPORT, 0},
			"SO_REUSEADDR": {unix.SO_REUSEADDR, map[bool]int{false: 1, true: 0}[s.packets]},
		} {
			if v, err := unix.GetsockoptInt(s.fd, unix.SOL_SOCKET, want[0]); v != want[1] || err != nil {
				t.Errorf("port %d: %s is %d, %v: want %d", s.port, name, v, err, want[1])
			}
		}
	}
	if _, err := NewDedicated(config, proxyDefaults, id, quiet); !errors.Is(err, unix.EADDRINUSE) {
		t.Errorf("a second one: %v", err)
	}
	if err := d.Close(0); err != nil {
		t.Error(err)
	}
	if listening(home) {
		t.Error("somebody listens here after Close")
	}
}
