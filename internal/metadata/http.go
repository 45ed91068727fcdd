package metadata

import (
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"
)

// The headers of IMDSv2.
const (
	tokenHeader = "X-aws-ec2-metadata-token"
	ttlHeader   = "X-aws-ec2-metadata-token-ttl-seconds"
	tokenPath   = "/latest/api/token"
)

var _ http.Handler = (*Service)(nil)

// ServeHTTP answers GET and HEAD everywhere, and PUT for a token.
func (s *Service) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	h := w.Header()
	h.Set("Server", "atoll")
	h.Set("Cache-Control", "no-store")
	h.Set("X-Content-Type-Options", "nosniff")
	switch host, _, _ := strings.Cut(r.Host, ":"); {
	// A proxy in the guest that passes on what strangers ask for says so; a browser that was given this address for another's name too.
	case r.Header.Get("X-Forwarded-For") != "" || r.Header.Get("Forwarded") != "":
		http.Error(w, "requests through a proxy are not answered", http.StatusForbidden)
		return
	case host != "" && host != Address.String():
		http.Error(w, "ask for http://"+Address.String()+"/", http.StatusForbidden)
		return
	case r.URL.Path == tokenPath:
		s.serveToken(w, r)
		return
	case r.Method != http.MethodGet && r.Method != http.MethodHead:
		h.Set("Allow", "GET, HEAD")
		http.Error(w, "only GET and HEAD", http.StatusMethodNotAllowed)
		return
	}
	t := s.trees.Load()
	if token := r.Header.Get(tokenHeader); token != "" && !s.tokens.good(token) || token == "" && !t.open(r.URL.Path) {
		http.Error(w, "this needs a token: PUT "+tokenPath+" with the header "+ttlHeader+", and send it as "+tokenHeader, http.StatusUnauthorized)
		return
	}
	kind, body, ok := t.find(r.URL.Path)
	if !ok {
		http.Error(w, "there is nothing at "+strconv.Quote(r.URL.Path), http.StatusNotFound)
		return
	}
	h.Set("Content-Type", kind)
	h.Set("Content-Length", strconv.Itoa(len(body)))
	if r.Method == http.MethodGet {
		_, _ = w.Write([]byte(body)) // a guest that went away is no fault
	}
}

func (s *Service) serveToken(w http.ResponseWriter, r *http.Request) {
	if r.Method != http.MethodPut {
		w.Header().Set("Allow", "PUT")
		http.Error(w, "only PUT", http.StatusMethodNotAllowed)
		return
	}
	seconds, err := strconv.Atoi(r.Header.Get(ttlHeader))
	if err != nil || seconds < 1 || seconds > int(maxTTL.Seconds()) {
		http.Error(w, fmt.Sprintf("the header %s says for how many seconds the token is wanted: 1 to %d", ttlHeader, int(maxTTL.Seconds())), http.StatusBadRequest)
		return
	}
	w.Header().Set("Content-Type", textPlain)
	w.Header().Set(ttlHeader, strconv.Itoa(seconds))
	_, _ = w.Write([]byte(s.tokens.issue(time.Duration(seconds) * time.Second)))
}

// open says whether the path is served without a token.
func (t *trees) open(path string) bool {
	return t.document.V1 || t.document.NoCloud && strings.HasPrefix(path, nocloudPath)
}

const (
	nocloudPath = "/nocloud/"
	plainPath   = "/atoll/v1"

	textPlain = "text/plain; charset=utf-8"
)

func (t *trees) find(path string) (kind, body string, ok bool) {
	if name, below := strings.CutPrefix(path, nocloudPath); below {
		if name == "" {
			return textPlain, "meta-data\nnetwork-config\nuser-data\nvendor-data\n", true
		}
		body, ok = t.nocloud[name]
		return "text/yaml; charset=utf-8", body, ok
	}
	if rest, below := strings.CutPrefix(path, plainPath); below && (rest == "" || rest[0] == '/') {
		return t.findPlain(strings.Trim(rest, "/"))
	}
	rest := strings.TrimPrefix(path, "/")
	if rest == "" {
		return textPlain, strings.Join(versions, "\n"), true
	}
	version, rest, _ := strings.Cut(rest, "/")
	if !slices.Contains(versions, version) {
		return "", "", false
	}
	if body, ok = t.ec2.values[rest]; ok {
		switch rest {
		case "user-data":
			return "application/octet-stream", body, true
		case "dynamic/instance-identity/document":
			return "application/json", body, true
		}
		return textPlain, body, true
	}
	if rest = strings.TrimSuffix(rest, "/"); rest == "" {
		rest = "."
	}
	body, ok = t.ec2.lists[rest]
	return textPlain, body, ok
}

// findPlain walks into objects by name and into lists by number.
func (t *trees) findPlain(path string) (kind, body string, ok bool) {
	value := t.plain
	for name := range strings.SplitSeq(path, "/") {
		if path == "" {
			break
		}
		switch in := value.(type) {
		case map[string]any:
			value, ok = in[name]
		case []any:
			i, err := strconv.Atoi(name)
			if ok = err == nil && i >= 0 && i < len(in); ok {
				value = in[i]
			}
		default:
			ok = false
		}
		if !ok {
			return "", "", false
		}
	}
	text, err := json.MarshalIndent(value, "", "  ")
	if err != nil {
		panic(err) // it came from JSON
	}
	return "application/json", string(text) + "\n", true
}
