package userdata

import (
	"bytes"
	"compress/gzip"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"mime"
	"mime/multipart"
	"mime/quotedprintable"
	"net/http"
	"net/mail"
	"net/textproto"
	"net/url"
	"strings"
	"time"

	"go.yaml.in/yaml/v3"

	"github.com/atollvm/atoll/internal/provision/outbound"
)

// gunzip unpacks what begins as gzip does; more than most bytes is an error.
func gunzip(data []byte, most int) (out []byte, packed bool, err error) {
	if !bytes.HasPrefix(data, []byte("\x1f\x8b")) {
		return data, false, nil
	}
	z, err := gzip.NewReader(bytes.NewReader(data))
	if err != nil {
		return nil, true, err
	}
	out, err = io.ReadAll(io.LimitReader(z, int64(most)+1))
	if err == nil && len(out) > most {
		err = fmt.Errorf("there are more than %d bytes in it", most)
	}
	return out, true, err
}

// message is a MIME message: of several parts, or of one.
func (w *walker) message(ctx context.Context, p part, depth int) {
	m, err := mail.ReadMessage(bytes.NewReader(p.data))
	if err != nil {
		w.fault(p, "reading it as a MIME message: %w", err)
		return
	}
	w.entity(ctx, p, textproto.MIMEHeader(m.Header), m.Body, depth)
}

// entity is what a message, or a part of one, has below its header.
func (w *walker) entity(ctx context.Context, p part, h textproto.MIMEHeader, body io.Reader, depth int) {
	kind, parameters := "text/plain", map[string]string{}
	if t := h.Get("Content-Type"); t != "" {
		var err error
		if kind, parameters, err = mime.ParseMediaType(t); err != nil {
			w.fault(p, "its Content-Type: %w", err)
			return
		}
	}
	for _, name := range []string{"Merge-Type", "X-Merge-Type"} {
		if h.Get(name) != "" {
			w.fault(p, "the header %s is not implemented", name)
		}
	}
	if i := h.Get("Launch-Index"); i != "" && i != "0" {
		w.fault(p, "the header Launch-Index is not implemented")
	}
	if strings.HasPrefix(kind, "multipart/") {
		w.multipart(ctx, p, body, parameters["boundary"], depth)
		return
	}
	switch encoding := strings.ToLower(h.Get("Content-Transfer-Encoding")); encoding {
	case "", "7bit", "8bit", "binary":
	case "base64":
		body = base64.NewDecoder(base64.StdEncoding, body)
	case "quoted-printable":
		body = quotedprintable.NewReader(body)
	default:
		w.fault(p, "its Content-Transfer-Encoding %q is not known", encoding)
		return
	}
	data, err := io.ReadAll(io.LimitReader(body, mostBytes+1))
	if err != nil {
		w.fault(p, "reading it: %w", err)
		return
	}
	p.kind, p.data = kind, data
	if kind == kindMessage {
		p.kind = ""
	}
	if _, disposition, err := mime.ParseMediaType(h.Get("Content-Disposition")); err == nil {
		p.file = disposition["filename"]
	}
	w.walk(ctx, p, depth+1)
}

func (w *walker) multipart(ctx context.Context, p part, body io.Reader, boundary string, depth int) {
	if boundary == "" {
		w.fault(p, "its Content-Type has no boundary")
		return
	}
	if depth > mostDepth {
		w.bound(p, depth)
		return
	}
	r := multipart.NewReader(body, boundary)
	for n := 1; !w.full; n++ {
		sub, err := r.NextRawPart()
		if errors.Is(err, io.EOF) {
			if n == 1 {
				w.fault(p, "it has no parts")
			}
			return
		}
		if err != nil {
			w.fault(p, "reading its part %d: %w", n, err)
			return
		}
		w.entity(ctx, part{name: p.child(n)}, sub.Header, sub, depth+1)
	}
}

// child names a part of a part, as "part 2.1".
func (p part) child(n int) string {
	if p.name == "" {
		return fmt.Sprint("part ", n)
	}
	return fmt.Sprintf("%s.%d", p.name, n)
}

// archive is a list, in YAML, of parts with their types.
func (w *walker) archive(ctx context.Context, p part, depth int) {
	var list []yaml.Node
	if err := yaml.Unmarshal(p.data, &list); err != nil {
		w.fault(p, "reading the archive: %s", strings.TrimPrefix(err.Error(), "yaml: "))
		return
	}
	for i := range list {
		sub := part{name: p.child(i + 1)}
		entry := struct {
			Type     string    `yaml:"type"`
			Content  yaml.Node `yaml:"content"`
			Filename string    `yaml:"filename"`
		}{}
		n := &list[i]
		switch n.Kind {
		case yaml.ScalarNode:
			sub.data = []byte(n.Value)
		case yaml.MappingNode:
			for j := 0; j < len(n.Content); j += 2 {
				switch key := n.Content[j].Value; key {
				case "type", "content", "filename":
				default:
					w.fault(sub, "line %d: %s: not implemented", n.Content[j].Line, key)
				}
			}
			if err := n.Decode(&entry); err != nil {
				w.fault(sub, "line %d: it has another form than type, content, filename", n.Line)
				continue
			}
			sub.kind, sub.file = entry.Type, entry.Filename
			if entry.Content.Kind == yaml.ScalarNode {
				sub.data = []byte(entry.Content.Value)
				break
			}
			data, err := yaml.Marshal(&entry.Content) // a config that is written as such
			if err != nil {
				w.fault(sub, "line %d: %w", n.Line, err)
				continue
			}
			sub.data = data
		default:
			w.fault(sub, "line %d: want a string, or keys with values", n.Line)
			continue
		}
		w.walk(ctx, sub, depth+1)
	}
}

// include takes what is at each URL as if it were here.
func (w *walker) include(ctx context.Context, p part, depth int) {
	n := 0
	for line := range strings.Lines(string(p.data)) {
		line = strings.TrimSpace(line)
		for _, beginning := range []string{"#include-once", "#include"} {
			if rest, ok := strings.CutPrefix(line, beginning); ok {
				line = strings.TrimSpace(rest)
				break
			}
		}
		if line == "" || line[0] == '#' {
			continue
		}
		u, err := url.Parse(line)
		if err != nil || u.Host == "" || u.Scheme != "http" && u.Scheme != "https" {
			w.fault(p, "%q is no URL of http or https", line[:min(len(line), 200)])
			continue
		}
		n++
		if w.fetched++; w.fetched > mostIncludes {
			w.full = true
			w.fault(p, "more than %d URLs are included", mostIncludes)
			return
		}
		if w.fetch == nil {
			continue
		}
		if w.outside == 0 {
			w.fetch.guard.Allow(u)
		}
		data, err := w.fetch.get(ctx, u)
		if err != nil {
			w.faults = append(w.faults, fmt.Errorf("including %s: %w", u.Redacted(), err))
			return
		}
		w.outside++
		w.walk(ctx, part{name: u.Redacted(), data: data}, depth+1)
		w.outside--
	}
	if n == 0 && !w.full {
		w.fault(p, "it includes nothing")
	}
}

const fetchTime = time.Minute

// fetcher gets what is included.
type fetcher struct {
	http  *http.Client
	guard *outbound.Guard
	alive func()
}

func newFetcher(o Options) *fetcher {
	base := o.Transport
	if base == nil {
		base = http.DefaultTransport.(*http.Transport)
	}
	g := outbound.New()
	return &fetcher{&http.Client{Transport: g.Transport(base), Timeout: fetchTime}, g, o.Alive}
}

func (f *fetcher) close() { f.http.CloseIdleConnections() }

func (f *fetcher) get(ctx context.Context, u *url.URL) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil)
	if err != nil {
		return nil, err
	}
	resp, err := f.http.Do(req)
	if wrapped := (*url.Error)(nil); errors.As(err, &wrapped) {
		err = wrapped.Err // it says the URL again
	}
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	if f.alive != nil {
		f.alive()
	}
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("the server says %s", resp.Status)
	}
	data, err := io.ReadAll(io.LimitReader(resp.Body, mostBytes+1))
	if err == nil && len(data) > mostBytes {
		err = fmt.Errorf("there are more than %d bytes", mostBytes)
	}
	return data, err
}
