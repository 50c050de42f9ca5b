package inpod

import (
	"errors"
	"log/slog"
	"time"

	"ambient-emulator/internal/netns"
	"ambient-emulator/ztunnel-emulator/internal/proxy"
)

// Dedicated is ztunnel for one workload alone, in the network namespace that the
// process is in (the real one's PROXY_MODE=dedicated). No agent names it, no
// namespace is entered, and that takes no capability.
type Dedicated struct {
	engine *engine
	pod    *pod
}

// NewDedicated makes the listeners here, and serves what comes by config. They bear
// no mark and share their ports with nobody, whatever c says.
func NewDedicated(c SocketConfig, config *proxy.Config, id proxy.Identity, log *slog.Logger) (*Dedicated, error) {
	c.Mark, c.PortReuse = 0, false
	e, err := newEngine(c.Addrs(), c.factory(log), config, log)
	if err != nil {
		return nil, err
	}
	if c.DNS {
		e.openDNS = c.openDNS
	}
	ns, err := netns.Open("/proc/self/ns/net")
	if err != nil {
		return nil, errors.Join(err, e.close())
	}
	d := &Dedicated{engine: e}
	var added Added
	if d.pod, added, err = e.startIn(ns, id, here); err != nil {
		return nil, errors.Join(err, ns.Close(), e.close())
	}
	log.Info("pod served", "pod", id.String(), "netns", ns.ID())
	if added.LoopDown {
		log.Warn(loopDownUntil+"ip link set lo up", "pod", id.String())
	}
	return d, nil
}

// here is a visit to where we are.
func here(fn func() error) (netns.Visit, error) { return netns.Visit{}, fn() }

// Active is how many pods are served: one.
func (d *Dedicated) Active() int { return 1 }

// Close ends the pod, gracefully before the deadline.
func (d *Dedicated) Close(deadline time.Duration) error {
	if deadline > 0 {
		d.engine.drain([]*pod{d.pod}, deadline)
	}
	return errors.Join(d.engine.stop(d.pod), d.engine.close())
}
