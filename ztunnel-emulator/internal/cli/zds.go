package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"ambient-emulator/internal/netns"
	"ambient-emulator/internal/zds"
	"ambient-emulator/ztunnel-emulator/internal/accesslog"
	"ambient-emulator/ztunnel-emulator/internal/dns"
	"ambient-emulator/ztunnel-emulator/internal/inpod"
	"ambient-emulator/ztunnel-emulator/internal/proxy"
)

// serveZDS is the real direction: dial the node agent, serve what it names. Or, in
// dedicated mode, serve where we are.
type serveZDS struct {
	path       string
	resolvConf string
	trace      bool
	stderr     io.Writer
	logging    *logging
	mesh       meshFlags
}

func (z *serveZDS) run() error {
	log, err := z.logging.logger(z.stderr)
	if err != nil {
		return err
	}
	config, err := readConfig()
	if err != nil {
		return err
	}
	ctx, stop := untilSignal()
	defer stop()

	if config.own == nil {
		if err := netns.Probe(); err != nil {
			return capabilityError(err)
		}
	}
	hadIPv6 := config.socket.IPv6
	if err := config.socket.Probe(); errors.Is(err, inpod.ErrNoMark) {
		return fmt.Errorf("%w: run it with sudo, or once: sudo setcap cap_sys_admin,cap_net_admin+ep %s; PACKET_MARK=0 does without", err, executable())
	} else if err != nil {
		return err
	}
	if hadIPv6 && !config.socket.IPv6 {
		log.Warn("this kernel has no IPv6: pods get listeners on 0.0.0.0")
	}

	readiness := new(inpod.Readiness)
	readiness.Block(inpod.ReadyTask)
	probes, err := serveReadiness(readiness, config.socket.IPv6)
	if err != nil {
		return err
	}
	defer probes.Close()

	pods := &proxy.Config{Mark: config.socket.Mark, KeepAlive: config.keepAlive, Log: log.With(accesslog.Target, accesslog.Access)}
	if config.socket.DNS {
		if pods.DNS, err = z.resolvers(log); err != nil {
			return err
		}
	}
	mesh, err := z.mesh.open(log)
	if err != nil {
		return err
	}
	if mesh != nil {
		pods.Mesh = mesh.Mesh
		pods.Mesh.Dedicated = config.own != nil
	}
	served, err := z.serve(ctx, config, pods, readiness, log)
	if served == nil {
		return errors.Join(err, mesh.close())
	}
	if err != nil {
		// The agent and we do not understand each other. The real ztunnel ends
		// here without draining; the kernel closes what is open.
		return err
	}

	n := served.Active()
	log.Info("draining", "pods", n, "deadline", config.deadline)
	err = errors.Join(served.Close(config.deadline), mesh.close())
	log.Info("stopped", "pods", n)
	return err
}

// serving is pods that are served until Close.
type serving interface {
	Active() int
	Close(deadline time.Duration) error
}

// serve serves pods until ctx ends, or the agent and we cannot go on. Without any to
// be closed, it has not begun.
func (z *serveZDS) serve(ctx context.Context, config config, pods *proxy.Config, readiness *inpod.Readiness, log *slog.Logger) (serving, error) {
	inPod := log.With(accesslog.Target, targetInPod)
	if config.own != nil {
		pod, err := inpod.NewDedicated(config.socket, pods, *config.own, inPod)
		if err != nil {
			return nil, err
		}
		readiness.Done(inpod.ReadyTask)
		<-ctx.Done()
		return pod, nil
	}
	workloads, err := inpod.NewWorkloads(config.socket, pods, inPod)
	if err != nil {
		return nil, err
	}
	manager := &inpod.Manager{Path: z.path, Workloads: workloads, Readiness: readiness, Log: inPod}
	if z.trace {
		manager.Trace = z.tracer()
	}
	log.Info("dialling the agent", "socket", z.path, "pid", os.Getpid(), "version", version)
	// Not on this goroutine, which is locked to the main thread.
	done := make(chan error, 1)
	go func() { done <- manager.Run(ctx) }()
	return workloads, <-done
}

// resolvers reads who is asked for what pods ask. The questions leave from the
// pods. The real ztunnel does not start without resolv.conf(5); here every query
// is then answered with SERVFAIL, unless the file was named.
func (z *serveZDS) resolvers(log *slog.Logger) (dns.Resolvers, error) {
	path := z.resolvConf
	if path == "" {
		path = "/etc/resolv.conf"
	}
	r, err := dns.ReadResolvers(path)
	switch {
	case err != nil && z.resolvConf == "":
		log.Warn("pods' DNS is answered with SERVFAIL: name a file with --resolv-conf", "error", err)
		return dns.Resolvers{}, nil
	case err != nil:
		return r, err
	}
	if own := r.NodeOnly(); len(own) > 0 {
		log.Warn("a resolver on the node's loopback does not answer in a pod: name another file with --resolv-conf", "file", path, "resolvers", fmt.Sprint(own))
	}
	return r, nil
}

// tracer prints packets, a line each.
func (z *serveZDS) tracer() func(zds.Packet) {
	var mu sync.Mutex
	return func(p zds.Packet) {
		mu.Lock()
		defer mu.Unlock()
		fmt.Fprintln(z.stderr, p)
	}
}

// serveReadiness answers readiness probes on ztunnel's fixed port.
func serveReadiness(h http.Handler, ipv6 bool) (io.Closer, error) {
	network, addr := "tcp4", fmt.Sprintf("0.0.0.0:%d", inpod.ReadinessPort)
	if ipv6 {
		network, addr = "tcp", fmt.Sprintf("[::]:%d", inpod.ReadinessPort)
	}
	var lc net.ListenConfig
	lc.SetMultipathTCP(false)
	l, err := lc.Listen(context.Background(), network, addr)
	if errors.Is(err, unix.EADDRINUSE) {
		return nil, fmt.Errorf("readiness: listen on %s: address already in use; is there another ztunnel in this network namespace? Give each its own: ip netns exec NODE ztunnel-emulator …", addr)
	}
	if err != nil {
		return nil, fmt.Errorf("readiness: %w", err)
	}
	server := &http.Server{Handler: h, ReadHeaderTimeout: 2 * time.Second, MaxHeaderBytes: 8 << 10}
	go server.Serve(l) // until Close
	return server, nil
}
