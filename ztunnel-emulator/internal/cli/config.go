package cli

import (
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"ambient-emulator/ztunnel-emulator/internal/inpod"
	"ambient-emulator/ztunnel-emulator/internal/proxy"
)

// config is what the real ztunnel's environment variables say. One that does
// not parse is an error, as there.
type config struct {
	own       *proxy.Identity // of the one workload of a dedicated ztunnel; nil: an agent names workloads
	socket    inpod.SocketConfig
	keepAlive proxy.KeepAlive
	deadline  time.Duration // for connections that run when a signal comes
}

func readConfig() (config, error) {
	c := config{
		socket:    inpod.SocketConfig{IPv6: true, Mark: inpod.DefaultMark, PortReuse: true, DNS: true},
		keepAlive: proxy.DefaultKeepAlive(),
		deadline:  5 * time.Second,
	}
	if err := c.readMode(); err != nil {
		return c, err
	}
	for name, to := range map[string]*bool{
		"IPV6_ENABLED": &c.socket.IPv6, "INPOD_PORT_REUSE": &c.socket.PortReuse,
		"KEEPALIVE_ENABLED": &c.keepAlive.Enabled, "USER_TIMEOUT_ENABLED": &c.keepAlive.UserTimeout,
	} {
		if v, ok, err := envBool(name); err != nil {
			return c, err
		} else if ok {
			*to = v
		}
	}
	if v, ok := os.LookupEnv("ISTIO_META_DNS_CAPTURE"); ok {
		c.socket.DNS = strings.EqualFold(v, "true")
	}
	if v, ok, err := envBool("ENABLE_ORIG_SRC"); err != nil {
		return c, err
	} else if ok {
		c.socket.OrigSrc = &v
	}
	if v, ok := os.LookupEnv("PACKET_MARK"); ok {
		mark, err := strconv.ParseUint(v, 10, 32)
		if err != nil {
			return c, usageError{fmt.Errorf("PACKET_MARK=%s: it takes a decimal number of 32 bits; 0 for no mark", v)}
		}
		c.socket.Mark = uint32(mark)
	}

	if err := c.readKeepAlive(); err != nil {
		return c, err
	}
	c.socket.KeepAlive = c.keepAlive

	if v, ok := os.LookupEnv("CONNECTION_TERMINATION_DEADLINE"); ok {
		d, err := time.ParseDuration(v)
		if err != nil || d < 0 {
			return c, usageError{fmt.Errorf("CONNECTION_TERMINATION_DEADLINE=%s: it takes a duration such as 5s or 1m30s", v)}
		}
		c.deadline = d
	} else if v, ok := os.LookupEnv("TERMINATION_GRACE_PERIOD_SECONDS"); ok {
		n, err := strconv.ParseUint(v, 10, 31)
		if err != nil {
			return c, usageError{fmt.Errorf("TERMINATION_GRACE_PERIOD_SECONDS=%s: it takes a number of seconds", v)}
		}
		c.deadline = graceDeadline(int(n))
	}
	return c, nil
}

// ownMode tells whether the environment wants a ztunnel without an agent, or would
// like something that readMode refuses.
func ownMode() bool {
	mode, ok := os.LookupEnv("PROXY_MODE")
	return ok && mode != "shared"
}

// readMode reads whether there is an agent. A dedicated ztunnel marks nothing unless
// it is told to.
func (c *config) readMode() error {
	if !ownMode() {
		return nil
	}
	if mode := os.Getenv("PROXY_MODE"); mode != "dedicated" {
		return usageError{fmt.Errorf("PROXY_MODE=%s: it takes shared or dedicated", mode)}
	}
	info := os.Getenv("PROXY_WORKLOAD_INFO")
	parts := strings.Split(info, "/")
	if len(parts) != 3 || slices.Contains(parts, "") {
		return usageError{fmt.Errorf("PROXY_WORKLOAD_INFO=%s: with PROXY_MODE=dedicated it says who we are, as namespace/name/service-account", info)}
	}
	c.own = &proxy.Identity{Namespace: parts[0], Name: parts[1], ServiceAccount: parts[2]}
	c.socket.Mark = 0
	return nil
}

// readKeepAlive reads when a silent peer is asked whether it lives. The kernel
// takes whole seconds, from one to nine hours.
func (c *config) readKeepAlive() error {
	for name, to := range map[string]*time.Duration{"KEEPALIVE_TIME": &c.keepAlive.Idle, "KEEPALIVE_INTERVAL": &c.keepAlive.Interval} {
		v, ok := os.LookupEnv(name)
		if !ok {
			continue
		}
		d, err := time.ParseDuration(v)
		if err != nil || d < time.Second || d > 32767*time.Second {
			return usageError{fmt.Errorf("%s=%s: it takes a duration such as 180s, from 1s to 32767s", name, v)}
		}
		*to = d
	}
	if v, ok := os.LookupEnv("KEEPALIVE_RETRIES"); ok {
		n, err := strconv.ParseUint(v, 10, 7)
		if err != nil || n == 0 {
			return usageError{fmt.Errorf("KEEPALIVE_RETRIES=%s: it takes a number from 1 to 127", v)}
		}
		c.keepAlive.Count = int(n)
	}
	return nil
}

// graceDeadline leaves some seconds of a pod's grace period for the rest.
func graceDeadline(grace int) time.Duration {
	if grace > 10 {
		return time.Duration(grace-5) * time.Second
	}
	return time.Duration(max(grace-1, 1)) * time.Second
}

// envBool reads a boolean as ztunnel does: exactly true or false.
func envBool(name string) (value, ok bool, err error) {
	v, ok := os.LookupEnv(name)
	switch {
	case !ok:
		return false, false, nil
	case v == "true":
		return true, true, nil
	case v == "false":
		return false, true, nil
	}
	return false, true, usageError{fmt.Errorf("%s=%s: it takes true or false", name, v)}
}
