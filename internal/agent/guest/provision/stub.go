package provision

import "errors"

var errTODO = errors.New("not implemented yet")

func (r *Provisioner) units() error       { return errTODO }
func (r *Provisioner) sshHostKeys() error { return errTODO }
func (r *Provisioner) timezone() error    { return errTODO }
func (r *Provisioner) locale() error      { return errTODO }
func (r *Provisioner) authorities() error { return errTODO }
func (r *Provisioner) mounts() error      { return errTODO }
func (r *Provisioner) secrets() error     { return errTODO }
func (r *Provisioner) packages() error    { return errTODO }
func (r *Provisioner) wantsPackages() bool {
	k := r.GetPackages()
	return len(k.GetNames()) > 0 || k.GetUpdate() || k.GetUpgrade()
}
