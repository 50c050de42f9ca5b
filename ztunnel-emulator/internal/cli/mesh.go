package cli

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/spf13/cobra"

	"ambient-emulator/ztunnel-emulator/internal/accesslog"
	"ambient-emulator/ztunnel-emulator/internal/hbone"
	"ambient-emulator/ztunnel-emulator/internal/identity"
	"ambient-emulator/ztunnel-emulator/internal/proxy"
	"ambient-emulator/ztunnel-emulator/internal/workload"
)

// meshFlags say who is who and what proves it. Without a local file there is no
// mesh.
type meshFlags struct {
	localXDS             string
	caCert, caKey, caDir string
}

func (f *meshFlags) bind(cmd *cobra.Command) {
	fs := cmd.Flags()
	fs.StringVar(&f.localXDS, "local-xds", os.Getenv("LOCAL_XDS_PATH"), "who is who: a `file` of workloads, services and policies (env LOCAL_XDS_PATH)")
	fs.StringVar(&f.caCert, "ca-cert", "", "the CA's certificate, a PEM `file`")
	fs.StringVar(&f.caKey, "ca-key", "", "its key, a PEM `file`, RSA or EC")
	fs.StringVar(&f.caDir, "ca-dir", "", "a CA that is made in this `folder` on first use, mode 0700; ztunnels that share it trust each other (with FAKE_CA=true default "+defaultCADir()+")")
}

// defaultCADir is beside the sockets.
func defaultCADir() string {
	if dir := os.Getenv("XDG_RUNTIME_DIR"); dir != "" && os.Getuid() != 0 {
		return filepath.Join(dir, "ztunnel-emulator", "ca")
	}
	return "/run/ztunnel-emulator/ca"
}

// mesh is a proxy.Mesh with what has to be closed after it.
type mesh struct {
	*proxy.Mesh
	stop  context.CancelFunc
	watch sync.WaitGroup
}

// open makes the mesh, or returns nil when there is no file.
func (f *meshFlags) open(log *slog.Logger) (*mesh, error) {
	inline, isInline := os.LookupEnv("LOCAL_XDS")
	if f.localXDS == "" && !isInline {
		if f.caCert != "" || f.caKey != "" || f.caDir != "" {
			return nil, usageError{errors.New("a CA without a mesh: --local-xds FILE says who is who")}
		}
		return nil, nil
	}
	if f.localXDS != "" && isInline {
		return nil, usageError{errors.New("either LOCAL_XDS or --local-xds (LOCAL_XDS_PATH), not both")}
	}
	c, err := readMeshConfig()
	if err != nil {
		return nil, err
	}
	ca, err := f.ca(log)
	if err != nil {
		return nil, err
	}
	app := log.With(accesslog.Target, "ztunnel::state")
	var store *workload.Store
	if isInline {
		store, err = workload.FromInline(inline, c.node, app)
	} else {
		store, err = workload.Open(f.localXDS, c.node, app)
	}
	if err != nil {
		return nil, err
	}

	m := &mesh{Mesh: &proxy.Mesh{
		Store: store, HBONE: c.hbone, Network: c.network,
		ResponseBaggage: c.responseBaggage, LocalhostAppTunnel: c.localhostAppTunnel, PolicyInfo: c.policyInfo,
		Log: log.With(accesslog.Target, "ztunnel::rbac"),
	}}
	ids := log.With(accesslog.Target, "ztunnel::identity")
	if c.crlPath != "" {
		if m.CRL, err = identity.OpenCRL(c.crlPath, ca.Roots(), identity.CRLOptions{Log: ids}); err != nil {
			store.Close()
			return nil, err
		}
		m.CRL.OnChange(m.Revoke)
	}
	m.Identities = identity.NewManager(ca, identity.Options{TTL: c.ttl, TLS12: c.tls12, PQC: c.pqc, CRL: m.CRL, Log: ids})
	ctx, cancel := context.WithCancel(context.Background())
	m.stop = cancel
	m.watch.Go(func() { m.Watch(ctx) })
	return m, nil
}

// close is for when the last pod has ended.
func (m *mesh) close() error {
	if m == nil {
		return nil
	}
	m.stop()
	m.watch.Wait()
	m.Store.Close()
	m.Identities.Close()
	if m.CRL != nil {
		return m.CRL.Close()
	}
	return nil
}

// ca opens the CA that the call or FAKE_CA names.
func (f *meshFlags) ca(log *slog.Logger) (*identity.CA, error) {
	fake, _, err := envBool("FAKE_CA")
	if err != nil {
		return nil, err
	}
	switch {
	case (f.caCert == "") != (f.caKey == ""):
		return nil, usageError{errors.New("--ca-cert and --ca-key go together")}
	case f.caCert != "" && f.caDir != "":
		return nil, usageError{errors.New("either --ca-cert and --ca-key or --ca-dir, not both")}
	case f.caCert != "":
		return identity.LoadCA(f.caCert, f.caKey)
	case !fake && f.caDir == "":
		return nil, usageError{errors.New("a mesh needs a CA: --ca-cert FILE --ca-key FILE, or --ca-dir FOLDER (FAKE_CA=true) to have one made")}
	}
	dir := f.caDir
	if dir == "" {
		dir = defaultCADir()
		if err := os.MkdirAll(filepath.Dir(dir), 0o700); err != nil {
			return nil, fmt.Errorf("%w; name a folder that we may make with --ca-dir", err)
		}
	}
	log.Info("a CA of our own, for who shares its folder", "folder", dir)
	return identity.OpenCA(dir)
}

// meshConfig is what the real ztunnel's environment variables say of a mesh.
type meshConfig struct {
	node, network      string
	hbone              hbone.Config
	ttl                time.Duration
	tls12, pqc         bool
	crlPath            string
	responseBaggage    bool
	localhostAppTunnel bool
	policyInfo         bool
}

func readMeshConfig() (meshConfig, error) {
	c := meshConfig{
		node: os.Getenv("NODE_NAME"), network: os.Getenv("NETWORK"), hbone: hbone.DefaultConfig(),
		tls12: os.Getenv("TLS12_ENABLED") == "true", crlPath: os.Getenv("CRL_PATH"),
		policyInfo: os.Getenv("AUTHZ_POLICY_INFO_LOGGING") == "true", responseBaggage: true, localhostAppTunnel: true,
	}
	switch v := os.Getenv("COMPLIANCE_POLICY"); v {
	case "":
	case "pqc":
		c.pqc = true
	default:
		return c, usageError{fmt.Errorf("COMPLIANCE_POLICY=%s: it takes pqc", v)}
	}
	for name, to := range map[string]*bool{"ENABLE_RESPONSE_BAGGAGE": &c.responseBaggage, "LOCALHOST_APP_TUNNEL": &c.localhostAppTunnel} {
		if v, ok, err := envBool(name); err != nil {
			return c, err
		} else if ok {
			*to = v
		}
	}
	for _, n := range []struct {
		name  string
		to    *time.Duration
		least time.Duration
	}{
		{"SECRET_TTL", &c.ttl, time.Second}, // certificates count in seconds
		{"POOL_UNUSED_RELEASE_TIMEOUT", &c.hbone.UnusedTimeout, time.Nanosecond},
	} {
		if v, ok := os.LookupEnv(n.name); ok {
			d, err := time.ParseDuration(v)
			if err != nil || d < n.least {
				return c, usageError{fmt.Errorf("%s=%s: it takes a duration such as 5m or 24h, at least %v", n.name, v, n.least)}
			}
			*n.to = d
		}
	}
	const most = 1<<31 - 1 // of a window, RFC 9113 section 6.9.1
	for _, n := range []struct {
		name        string
		to          *int
		least, most int
	}{
		{"POOL_MAX_STREAMS_PER_CONNECTION", &c.hbone.MaxStreamsPerConn, 1, most},
		{"HTTP2_STREAM_WINDOW_SIZE", &c.hbone.StreamWindow, 1, most},
		{"HTTP2_CONNECTION_WINDOW_SIZE", &c.hbone.ConnWindow, 65535, most},
		{"HTTP2_FRAME_SIZE", &c.hbone.MaxFrame, 16384, 1<<24 - 1},
	} {
		if v, ok := os.LookupEnv(n.name); ok {
			i, err := strconv.Atoi(strings.TrimSpace(v))
			if err != nil || i < n.least || i > n.most {
				return c, usageError{fmt.Errorf("%s=%s: it takes a number from %d to %d", n.name, v, n.least, n.most)}
			}
			*n.to = i
		}
	}
	return c, nil
}
