package identity

import (
	"bytes"
	"cmp"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/fsnotify/fsnotify"
)

// DefaultDebounce is how long after the first sign of a change the CRL file is
// read again, as in ztunnel.
const DefaultDebounce = 2 * time.Second

// ErrRevoked is the cause when a peer's certificate is on a revocation list.
var ErrRevoked = errors.New("certificate revoked by CRL")

// CRLOptions of a CRL. The zero value is ztunnel's default.
type CRLOptions struct {
	Debounce time.Duration // 0 is DefaultDebounce
	Log      *slog.Logger  // nil is slog.Default()
}

// CRL holds the revocation lists in a file, and follows the file. A nil *CRL
// revokes nothing. It is safe for concurrent use.
type CRL struct {
	path  string
	roots []*x509.Certificate
	opts  CRLOptions
	lists atomic.Pointer[revocations] // nil: nothing is checked

	watcher *fsnotify.Watcher // nil: switched off for good
	done    chan struct{}     // closed when watch has ended

	text     []byte // what lists was parsed from; only load uses it
	mu       sync.Mutex
	onChange []func()
}

// OpenCRL reads the file at path and watches its directory, so that a file that is
// replaced, or a Kubernetes volume's symbolic link, is followed too. Lists are
// signed by one of roots or by an intermediate that a peer shows.
//
// As in ztunnel: no file disables the check until there is one; a file that is
// none of lists disables it for good, with a warning; and what can't be read later
// leaves the lists as they are. The owner closes the CRL.
func OpenCRL(path string, roots []*x509.Certificate, opts CRLOptions) (*CRL, error) {
	opts.Debounce = cmp.Or(opts.Debounce, DefaultDebounce)
	opts.Log = cmp.Or(opts.Log, slog.Default())
	c := &CRL{path: path, roots: roots, opts: opts}

	w, err := fsnotify.NewWatcher()
	if err != nil {
		return nil, fmt.Errorf("watch CRL %s: %w", path, err)
	}
	// Watch first: what changes during the first look is not missed.
	if err := w.Add(filepath.Dir(path)); err != nil {
		w.Close()
		return nil, fmt.Errorf("watch CRL %s: the directory must be there: %w", path, err)
	}
	var perr *fs.PathError
	switch _, err := c.load(); {
	case err == nil:
	case errors.As(err, &perr):
		opts.Log.Warn("no CRL yet: nothing counts as revoked until there is", "path", path, "error", err)
	default:
		opts.Log.Warn("CRL is corrupt: nothing counts as revoked for as long as this process runs", "path", path, "error", err)
		return c, w.Close()
	}
	c.watcher, c.done = w, make(chan struct{})
	go c.watch()
	return c, nil
}

// Close stops watching and waits until nothing is under way. The lists stay.
func (c *CRL) Close() error {
	if c == nil || c.watcher == nil {
		return nil
	}
	err := c.watcher.Close()
	<-c.done
	return err
}

// OnChange has f called after each change of the lists, from the goroutine that
// watches; f must not call Close.
func (c *CRL) OnChange(f func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.onChange = append(c.onChange, f)
}

// Revoked tells whether a certificate of chain, leaf first, is on a list. It is
// what to ask about a connection that stands, with its PeerCertificates.
func (c *CRL) Revoked(chain []*x509.Certificate) bool { return errors.Is(c.Check(chain), ErrRevoked) }

// Check is what a handshake asks. Nobody's list says nothing about a certificate,
// and so allows it; nor does a list's age matter. A list of the issuer's name that
// the issuer has not signed allows nobody. The error is a *PeerError.
func (c *CRL) Check(chain []*x509.Certificate) error {
	if c == nil {
		return nil
	}
	lists := c.lists.Load()
	if lists == nil {
		return nil
	}
	for _, cert := range chain {
		if err := lists.check(cert, chain); err != nil {
			return &PeerError{Peer: chain, Err: err}
		}
	}
	return nil
}

// watch reads the file again a while after anything has happened in its directory.
func (c *CRL) watch() {
	defer close(c.done)
	var quiet <-chan time.Time // nil: nothing has happened
	for {
		select {
		case _, ok := <-c.watcher.Events:
			if !ok {
				return
			}
			if quiet == nil {
				quiet = time.After(c.opts.Debounce)
			}
		case err, ok := <-c.watcher.Errors:
			if !ok {
				return
			}
			c.opts.Log.Warn("watching the CRL", "path", c.path, "error", err)
			if quiet == nil {
				quiet = time.After(c.opts.Debounce) // events were lost, perhaps
			}
		case <-quiet:
			quiet = nil
			c.reload()
		}
	}
}

func (c *CRL) reload() {
	changed, err := c.load()
	if err != nil {
		c.opts.Log.Warn("CRL not updated: what was revoked stays so", "path", c.path, "error", err)
	}
	if !changed {
		return
	}
	c.mu.Lock()
	calls := slices.Clone(c.onChange)
	c.mu.Unlock()
	for _, f := range calls {
		f()
	}
}

// load takes the file over, if it is another than before.
func (c *CRL) load() (changed bool, err error) {
	text, err := os.ReadFile(c.path)
	if err != nil {
		return false, err
	}
	if c.lists.Load() != nil && bytes.Equal(text, c.text) {
		return false, nil
	}
	lists, err := parseCRLs(text, c.roots)
	if err != nil {
		return false, err
	}
	c.text = text
	c.lists.Store(lists)
	c.opts.Log.Info("CRL loaded", "path", c.path, "lists", len(lists.all), "revoked", lists.count)
	return true, nil
}

// revocations are the lists of one file. They never change.
type revocations struct {
	all   []*revocationList
	count int
}

type revocationList struct {
	list    *x509.RevocationList
	serials map[string]bool   // big-endian bytes
	root    *x509.Certificate // who signed it; nil if no root did, but an intermediate perhaps
}

// parseCRLs reads PEM blocks "X509 CRL", or one list in DER.
func parseCRLs(text []byte, roots []*x509.Certificate) (*revocations, error) {
	r := &revocations{}
	block, rest := pem.Decode(text)
	if block == nil {
		return r, r.add(text, roots)
	}
	for ; block != nil; block, rest = pem.Decode(rest) {
		if block.Type != "X509 CRL" {
			return nil, fmt.Errorf("a PEM block %q: want X509 CRL", block.Type)
		}
		if err := r.add(block.Bytes, roots); err != nil {
			return nil, err
		}
		if bytes.Contains(rest, []byte("-----BEGIN")) && !bytes.Contains(rest, []byte("-----END")) {
			return nil, errors.New("the file ends within a PEM block")
		}
	}
	return r, nil
}

func (r *revocations) add(der []byte, roots []*x509.Certificate) error {
	list, err := x509.ParseRevocationList(der)
	if err != nil {
		return err
	}
	l := &revocationList{list: list, serials: make(map[string]bool, len(list.RevokedCertificateEntries))}
	for _, e := range list.RevokedCertificateEntries {
		l.serials[string(e.SerialNumber.Bytes())] = true
	}
	l.root = l.signedBy(roots) // once: the signature is over the whole list
	r.all = append(r.all, l)
	r.count += len(l.serials)
	return nil
}

// signedBy returns which of certs has signed the list, or nil.
func (l *revocationList) signedBy(certs []*x509.Certificate) *x509.Certificate {
	for _, cert := range certs {
		if bytes.Equal(cert.RawSubject, l.list.RawIssuer) && l.list.CheckSignatureFrom(cert) == nil {
			return cert
		}
	}
	return nil
}

// check looks cert, which came in chain, up in the list of its issuer. Two roots
// may bear one name, as ztunnel's two test roots do: each has a list of its own.
func (r *revocations) check(cert *x509.Certificate, chain []*x509.Certificate) error {
	var named, signed bool
	for _, l := range r.all {
		if !bytes.Equal(l.list.RawIssuer, cert.RawIssuer) {
			continue
		}
		named = true
		issuer := l.root
		if issuer == nil {
			issuer = l.signedBy(chain)
		}
		if issuer == nil || cert.CheckSignatureFrom(issuer) != nil {
			continue
		}
		signed = true
		if l.serials[string(cert.SerialNumber.Bytes())] {
			return fmt.Errorf("serial %d: %w", cert.SerialNumber, ErrRevoked)
		}
	}
	if named && !signed {
		return fmt.Errorf("the CRL in the name of %q is not signed by the issuer", cert.Issuer)
	}
	return nil
}
